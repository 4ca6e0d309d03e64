"""The forms that `secateur compile` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secateur.compile.dense import write_dense
from secateur.compile.pack import pack_model
from secateur.compile.report import PackReport


@dataclass(frozen=True)
class Format:
    """A form that a pruned model can be stored in."""

    description: str
    write: Callable[..., PackReport]


FORMATS = {
    "packed": Format(
        "bitmask + kept values, also as int8 or int4, in a Hugging Face directory; opens with "
        "transformers",
        pack_model,
    ),
    "dense": Format(
        "plain Hugging Face weights in another value type: the control, and the way back",
        write_dense,
    ),
}
