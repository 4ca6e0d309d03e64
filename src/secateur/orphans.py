"""Recognising checkpoints in sparse forms that lost their software, by config and headers alone.

compressed-tensors dropped its sparse forms after 0.13, and vLLM its readers and kernels of them.
`secateur.compile.orphan` reads them.
"""

from __future__ import annotations

from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError

# A linear is stored in one of these forms if it has a tensor of this ending.
MARKS = {".bitmask": "bitmask", ".scale_packed": "marlin-24", ".B_24": "GPTQ marlin-24"}
_PLACES = ("quantization_config", "compression_config", "sparsity_config")


def compression_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of compression, wherever its era put it.

    Returns:
        The keys of ``quantization_config`` (``compression_config`` before August 2024), with
        ``sparsity_config`` beside them even if it stands at the top of the file; empty if none.
    """
    found: dict[str, Any] = {}
    for place in _PLACES[:2]:
        if isinstance(config.get(place), dict):
            found = dict(config[place])
    if isinstance(config.get("sparsity_config"), dict):
        found.setdefault("sparsity_config", config["sparsity_config"])
    return found


def without_compression(config: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of the plain weights."""
    return {key: value for key, value in config.items() if key not in _PLACES}


def recognise(checkpoint: Checkpoint) -> str | None:
    """What an orphaned checkpoint is, in words, or None if it is none.

    Weights with zeros in place are an orphan only if the config says that they are 2:4:
    "unstructured" stands in many that are not sparse at all.
    """
    compression = compression_of(checkpoint.config)
    if compression.get("quant_method") == "secateur":
        return None
    sparsity = compression.get("sparsity_config") or {}
    stored = {form for end, form in MARKS.items() if _any_ends(checkpoint, end)}
    if not stored and sparsity.get("sparsity_structure") != "2:4":
        return None
    form = " and ".join(sorted(stored)) or "dense weights with zeros in place"
    if stored == {"bitmask"}:
        form = "sparse-bitmask" if _any_ends(checkpoint, ".row_offsets") else "sparse-24-bitmask"
    if compression.get("format") in ("float-quantized", "int-quantized", "naive-quantized"):
        form += f", {compression['format']}"
    version = compression.get("version")
    if stored <= {"bitmask", "marlin-24"}:
        form += f" (compressed-tensors{f' {version}' if version else ''})"
    return form


def is_sparse_form(compression: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` alone says that weights are in a form that no engine reads.

    Sparse weights that are stored dense, or quantised in a form that engines still read, are none.
    """
    method = compression.get("quant_method")
    if method == "gptq":
        marks = ("marlin_24", "gptq_marlin_24")
        return compression.get("checkpoint_format") in marks
    sparsity = compression.get("sparsity_config") or {}
    forms = {compression.get("format"), sparsity.get("format")}
    known = {"sparse-24-bitmask", "sparse-bitmask", "marlin-24"}
    return method in ("compressed-tensors", "sparseml") and bool(forms & known)


def rescue(path: object) -> str:
    """The command that makes a packed model of an orphaned checkpoint."""
    return f"secateur compile {path} -o {str(path).rstrip('/')}-packed --format packed"


def refuse_orphan(checkpoint: Checkpoint) -> None:
    """Raise ModelError, with the command that rescues it, if a checkpoint is an orphan."""
    form = recognise(checkpoint)
    if form is not None:
        raise ModelError(
            f"{checkpoint.path} holds {form}, which no engine reads as it is",
            f"make a packed model of it: `{rescue(checkpoint.path)}`",
        )


def _any_ends(checkpoint: Checkpoint, end: str) -> bool:
    return any(name.endswith(end) for name in checkpoint.names())
