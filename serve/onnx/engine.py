"""The ``onnx`` engine: a decoder in ONNX Runtime; running requests take turns."""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoint import read_json
from secateur.serve.onnx.session import OnnxModel
from secateur.serve.sampling import Floats
from secateur.serve.text import TextCodec
from secateur.serve.tokenizer import JsonTokenizer
from secateur.serve.turns import Sequence, TurnsEngine

_GENERATION = "generation_config.json"


def load_onnx(
    directory: Path, model_name: str, threads: int | None, providers: Many[str] = ()
) -> OnnxEngine:
    """Open a directory that `secateur compile --format onnx` wrote.

    Raises:
        ModelError, UsageError, EnvironmentFault: see `OnnxModel.open`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    codec = TextCodec(JsonTokenizer(directory))
    model = OnnxModel.open(directory, threads, providers)
    generation = directory / _GENERATION
    ends = read_json(generation).get("eos_token_id") if generation.exists() else None
    return OnnxEngine(model, codec, model_name=model_name, threads=threads, ends=ends)


class OnnxEngine(TurnsEngine):
    """See the module.

    Args:
        model: from now on only the worker touches it.
        codec: its tokenizer.
        model_name: the name to serve it under.
        threads: of the CPU, for the log.
        ends: end-of-sequence tokens; None: those of the config, or of the tokenizer.
        max_running, max_waiting: as of `TurnsEngine`.
    """

    name = "onnx"

    def __init__(
        self,
        model: OnnxModel,
        codec: TextCodec,
        *,
        model_name: str,
        threads: int,
        ends: Any = None,
        max_running: int = 16,
        max_waiting: int = 256,
    ) -> None:
        super().__init__(max_running, max_waiting)
        self.model_name = model_name
        self.codec = codec
        self.vocabulary_size = int(model.config["vocab_size"])
        self.max_length = model.max_length
        providers = ", ".join(model.session.get_providers())
        self.description = f"{providers}, {threads} threads, maximum length {self.max_length}"
        known = (ends, model.config.get("eos_token_id"), codec.eos_token_id)
        found: Any = next((one for one in known if one is not None), [])
        self.end_tokens = frozenset(found if isinstance(found, list) else [found])
        self._model = model
        self._start()

    def _logits(self, sequence: Sequence, inputs: tuple[int, ...], every: bool) -> Floats:
        ids = np.array([inputs], np.int64)
        logits, sequence.cache = self._model.step(ids, sequence.cache or ())
        answer: Floats = logits[0]
        return answer
