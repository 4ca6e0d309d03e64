"""The ``transformers`` engine: any causal LM that transformers can open, on a thread of its own.

One worker owns the model; running requests take turns.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.checkpoint import Checkpoint
from secateur.device import choose_dtype
from secateur.model import load_causal_lm, load_tokenizer
from secateur.serve.linear import kernel_report
from secateur.serve.sampling import Floats
from secateur.serve.text import TextCodec
from secateur.serve.turns import Sequence, TurnsEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MAX_LENGTH = 2048


def load_transformers(
    directory: Path, *, model_name: str, threads: int | None = None, max_running: int = 16
) -> TransformersEngine:
    """Open a model directory; choices that are not the checkpoint's own go to stderr.

    Raises:
        ModelError: the directory is not a usable model.
    """
    config = Checkpoint(directory).config
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype, reason = choose_dtype("auto", torch.device("cpu"), str(stored))
    if reason:
        print(f"serve: {reason}", file=sys.stderr)
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    codec = TextCodec(load_tokenizer(directory))
    model = load_causal_lm(directory, dtype)
    for use in kernel_report(model):
        print(f"serve: {use}", file=sys.stderr)
    with torch.inference_mode():  # the first run reads the weights from disk: not at a user's cost
        model(input_ids=torch.zeros((1, 1), dtype=torch.long))
    return TransformersEngine(
        model, codec, model_name=model_name, threads=threads, max_running=max_running
    )


class TransformersEngine(TurnsEngine):
    """See the module.

    Args:
        model: in evaluation mode; from now on only the worker touches it.
        codec: its tokenizer.
        model_name: the name to serve it under.
        threads: CPU threads of the worker.
        max_running: requests that take turns; more wait. Each has a KV cache of its own.
        max_waiting: requests that wait; more are refused as `EngineBusy`.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        codec: TextCodec,
        *,
        model_name: str,
        threads: int,
        max_running: int = 16,
        max_waiting: int = 256,
    ) -> None:
        super().__init__(max_running, max_waiting)
        config = model.config.get_text_config()
        self.model_name = model_name
        self.codec = codec
        self.vocabulary_size = int(config.vocab_size)
        known = getattr(config, "max_position_embeddings", None)
        if known is None:
            print(
                f"serve: config.json names no max_position_embeddings; using {DEFAULT_MAX_LENGTH}",
                file=sys.stderr,
            )
        self.max_length = int(known or DEFAULT_MAX_LENGTH)
        dtype = str(model.dtype).removeprefix("torch.")
        self.description = f"{dtype}, {threads} threads, maximum length {self.max_length}"
        self.end_tokens = _end_tokens(model, codec)
        self._model = model
        self._short_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._threads = threads
        self._start()

    def report(self) -> tuple[str, ...]:
        """What computes the packed linears."""
        return tuple(map(str, kernel_report(self._model)))

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)  # also a property of the calling thread
        with torch.inference_mode():
            super()._serve()

    def _logits(self, sequence: Sequence, inputs: tuple[int, ...], every: bool) -> Floats:
        options = {} if every or not self._short_logits else {"logits_to_keep": 1}
        answer = self._model(
            input_ids=torch.tensor([inputs], device=self._model.device),
            past_key_values=sequence.cache,
            use_cache=True,
            **options,
        )
        sequence.cache = answer.past_key_values
        logits: Floats = answer.logits[0].float().numpy(force=True)
        return logits


def _end_tokens(model: PreTrainedModel, codec: TextCodec) -> frozenset[int]:
    """The tokens after which the model itself says that the text is over."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = codec.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])
