"""The forms that `secateur compile` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secateur.compile.dense import write_dense
from secateur.compile.export import write_compressed_tensors, write_marlin24
from secateur.compile.onnx.write import write_onnx
from secateur.compile.pack import pack_model
from secateur.compile.report import PackReport


@dataclass(frozen=True)
class Format:
    """A form that a pruned model can be stored in.

    Attributes:
        description: in words.
        write: makes the directory.
        options: what it takes besides ``values`` and ``overwrite``.
        walks: the values that a walk over a calibration text makes; it takes the options of that.
    """

    description: str
    write: Callable[..., PackReport]
    options: frozenset[str] = frozenset()
    walks: tuple[str, ...] = ()


FORMATS = {
    "packed": Format(
        "bitmask + kept values, also as int8, int4 or fp8, in a Hugging Face directory; opens with "
        "transformers",
        pack_model,
        frozenset({"group_size"}),
        ("int8", "int4", "fp8"),
    ),
    "dense": Format(
        "plain Hugging Face weights in another value type: the control, and the way back",
        write_dense,
    ),
    "compressed-tensors": Format(
        "sparse-24-bitmask or sparse-bitmask, also of fp8 or int8, for compressed-tensors up to "
        "0.13 and vLLM up to 0.17",
        write_compressed_tensors,
        frozenset({"scales", "era"}),
    ),
    "marlin-24": Format(
        "2:4 as int4 or int8 in the order of the Sparse-Marlin kernel, for vLLM up to 0.14",
        write_marlin24,
        frozenset({"scales"}),
        ("int8", "int4"),
    ),
    "onnx": Format(
        "a decoder with KV cache for ONNX Runtime: bitmasks that it expands when it opens the "
        "file, or dense or sparse initializers",
        write_onnx,
        frozenset({"group_size", "onnx_weights"}),
        ("int8", "int4"),
    ),
}
