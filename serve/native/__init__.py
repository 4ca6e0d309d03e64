"""The native engine: a whole step of a model in C++, and the scheduler that fills its batches."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelError, UsageError, did_you_mean

if TYPE_CHECKING:
    from secateur.serve.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOptions:
    """Settings of the native engine; None leaves the choice to it.

    Attributes:
        kv_cache_type: type of keys and values in the cache: fp32, fp16 or int8.
        kv_cache_memory: bytes of the cache.
        values: value type of linears that are not packed: fp32, bf16, fp16, int8 or int4.
        head_values: value type of the output layer: auto, fp32, bf16, fp16, int8 or int4.
        max_length: tokens that prompt and output together may have.
        max_running: sequences computed at once.
        max_waiting: requests that may wait; more are refused.
        token_budget: tokens of prompts read per step.
        deadline: seconds that a request may take, waiting included.
        cache_weights: keep the packed weights in a file that processes share.
    """

    kv_cache_type: str | None = None
    kv_cache_memory: int | None = None
    values: str | None = None
    head_values: str | None = None
    max_length: int | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    token_budget: int | None = None
    deadline: float | None = None
    cache_weights: bool | None = None

    def given(self) -> dict[str, Any]:
        """The settings that were made."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_OF_THE_MODEL = {
    "kv_cache_type": "kv_type",
    "kv_cache_memory": "kv_bytes",
    "values": "values",
    "head_values": "head",
    "max_length": "max_length",
    "cache_weights": "cache_weights",
}


_VALUES = ("fp32", "bf16", "fp16", "int8", "int4")
_NAMES = {
    "kv_cache_type": ("fp32", "fp16", "int8"),
    "values": _VALUES,
    "head_values": ("auto", *_VALUES),
}


def _check(options: NativeOptions) -> None:
    for name, known in _NAMES.items():
        given = getattr(options, name)
        if given is not None and given not in known:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {given!r} is unknown", did_you_mean(given, known))


def native_obstacle(directory: Path) -> str | None:
    """Why the native engine cannot run this model, or None if it can; reads settings only.

    Raises:
        ModelError: there is no model.
    """
    from secateur.serve.native.config import obstacle

    if not directory.is_dir():
        raise ModelError(
            f"there is no model directory at {directory}",
            "give the path of a Hugging Face model directory (config.json + *.safetensors)",
        )
    if (reason := obstacle(directory)) is not None:
        return reason
    if not (directory / "tokenizer.json").exists():
        return "it has no tokenizer.json"
    if find_spec("secateur.compile._kernels") is None:
        return "secateur was installed without its native module; see `secateur doctor`"
    return None


def load_native(
    directory: Path, model_name: str, threads: int | None, options: NativeOptions
) -> Engine:
    """Open a model directory on the native engine; neither torch nor transformers is imported.

    Args:
        directory: the model.
        model_name: the name to serve it under.
        threads: CPU threads; None: all cores of this process.
        options: see `NativeOptions`.

    Raises:
        ModelError: the directory is not a usable model, or not one that this engine runs.
        UsageError: an option is unknown, or does not fit the model.
    """
    _check(options)
    from secateur.serve.native.engine import NativeEngine
    from secateur.serve.native.model import NativeModel
    from secateur.serve.text import TextCodec
    from secateur.serve.tokenizer import JsonTokenizer

    threads = threads or len(os.sched_getaffinity(0))
    codec = TextCodec(JsonTokenizer(directory))
    given = options.given()
    of_model = {_OF_THE_MODEL[name]: given.pop(name) for name in _OF_THE_MODEL if name in given}
    model = NativeModel.open(directory, threads=threads, **of_model)
    return NativeEngine(
        model,
        codec,
        model_name=model_name,
        report=map(str, model.report),
        **given,
    )
