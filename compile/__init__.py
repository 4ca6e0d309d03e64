"""compile: store what is left of a pruned model in a form that is smaller and quick to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secateur.compile.dense import write_dense
from secateur.compile.pack import LayerReport, PackReport, pack_model
from secateur.compile.packed import PackedModel, read_packed

__all__ = ["FORMATS", "Format", "LayerReport", "PackReport", "PackedModel", "pack_model"]
__all__ += ["read_packed", "write_dense"]


@dataclass(frozen=True)
class Format:
    """A form that a pruned model can be stored in."""

    description: str
    write: Callable[..., PackReport]


FORMATS = {
    "packed": Format(
        "bitmask + kept values in a Hugging Face directory; opens with transformers", pack_model
    ),
    "dense": Format(
        "plain Hugging Face weights in another value type: the control, and the way back",
        write_dense,
    ),
}
