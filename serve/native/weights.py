"""The linears, norms and the embedding of a model directory, for the native decoder.

    packed   stored tensors, checked, in the CPU layout of their pattern
    pruned   masks.safetensors decides what is kept; the values keep their type
    dense    in the type that they are stored in; fp32 values that all are bf16 or fp16 numbers
             become these, which changes none of them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from secateur.checkpoint import CONFIG
from secateur.compile import cpu
from secateur.compile.config import BITMASK, QUANT_METHOD, SCALES, VALUES, PackedConfig
from secateur.compile.stored import Array, check_headers, pieces
from secateur.errors import ModelError
from secateur.mapped import MappedCheckpoint
from secateur.pattern import Pattern

_DAMAGED = "the model is damaged: get it again"
_STORED: dict[str, cpu.Values] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}

# A matrix of the kernels, whether its activations are int8, and its biases.
Part = tuple[Any, bool, cpu.Floats | None]


@dataclass
class Weights:
    """A model directory's weights.

    Attributes:
        checkpoint: its files.
        matrices: of every linear that was packed so far, in order.
    """

    checkpoint: MappedCheckpoint
    matrices: dict[str, cpu.CpuMatrix] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path) -> Weights:
        """Open a directory and check its headers.

        Raises:
            ModelError: a file is absent or damaged, or is not what the config says.
        """
        weights = cls(MappedCheckpoint(directory))
        weights._packed = None
        content = weights.checkpoint.config.get("quantization_config")
        if content is not None:
            weights._packed = PackedConfig.parse(content, str(weights.checkpoint.path / CONFIG))
            check_headers(weights.checkpoint.files, weights._packed)
        return weights

    _packed: PackedConfig | None = None

    def linear(self, name: str, shape: tuple[int, int], bias: bool) -> Part:
        """The linear ``name`` [rows, columns] in a layout of this CPU."""
        if self._packed is not None and name in self._packed.layers:
            matrix = self._from_packed(name, shape)
        else:
            matrix = self._from_dense(name + ".weight", shape)
        self.matrices[name] = matrix
        if (name + ".bias" in self.checkpoint) != bias:
            said = "there should be none" if not bias else "it is absent"
            raise ModelError(f"tensor {name + '.bias'!r}: {said}", _DAMAGED)
        biases = self.vector(name + ".bias", shape[0]) if bias else None
        return matrix._native, matrix.activations == "int8", biases

    def head(self, name: str, shape: tuple[int, int]) -> Part:
        """The head, from the tensor ``name``."""
        matrix = self._from_dense(name, shape)
        self.matrices["lm_head"] = matrix
        return matrix._native, matrix.activations == "int8", None

    def vector(self, name: str, length: int, offset: float = 0.0) -> cpu.Floats:
        """A norm or bias, float32 ``[length]``, with ``offset`` added to it."""
        self._check_shape(name, (length,))
        wide = _widened(self.checkpoint.array(name), self.checkpoint.dtype(name), name)
        if not np.isfinite(wide).all():
            raise ModelError(f"tensor {name!r} holds NaN or infinity", _DAMAGED)
        return wide + np.float32(offset)

    def table(self, name: str, shape: tuple[int, int]) -> tuple[Array, str]:
        """An embedding where it lies in its file: uint8 [rows, bytes of a row], and its type."""
        self._check_shape(name, shape)
        kind = self.checkpoint.dtype(name)
        if kind not in _STORED:
            raise ModelError(f"tensor {name!r} is of type {kind}", "use F32, BF16 or F16")
        return self.checkpoint.array(name).view(np.uint8).reshape(shape[0], -1), _STORED[kind]

    def _from_packed(self, name: str, shape: tuple[int, int]) -> cpu.CpuMatrix:
        assert self._packed is not None
        layer, config = self._packed.layers[name], self._packed
        if layer.shape != shape:
            raise ModelError(
                f"config.json calls {name!r} a packed linear of shape {layer.shape}, but the model "
                f"has {shape} there",
                "write the directory again with `secateur compile`",
            )
        stored = {
            end: self._aligned(name + end) if name + end in config.stored(name) else None
            for end in (BITMASK, VALUES, SCALES)
        }
        values = stored[VALUES]
        assert values is not None
        kind: cpu.Values = config.values
        if kind == "fp32":
            values, kind = _narrowest(values)
        elif kind == "fp16":
            values = values.view(np.uint16)
        parts = pieces(
            name, layer, stored[BITMASK], values, stored[SCALES], kind, config.group_size
        )
        matrix = cpu.pack(
            parts.values,
            parts.bitmask,
            shape,
            layer.pattern,
            kind,
            scales=parts.scales,
            group_size=parts.group_size,
        )
        for end in config.stored(name):
            self.checkpoint.release(end)
        return matrix

    def _from_dense(self, tensor: str, shape: tuple[int, int]) -> cpu.CpuMatrix:
        self._check_shape(tensor, shape)
        stored = self.checkpoint.dtype(tensor)
        if stored not in _STORED:
            raise ModelError(f"tensor {tensor!r} is of type {stored}", "use F32, BF16 or F16")
        kind = _STORED[stored]
        values = self._aligned(tensor)
        if kind == "fp32":
            values, kind = _narrowest(values)
        elif kind == "fp16":
            values = values.view(np.uint16)
        matrix = cpu.pack(values, None, shape, Pattern(), kind)
        self.checkpoint.release(tensor)
        return matrix

    def _aligned(self, name: str) -> Array:
        return np.require(self.checkpoint.array(name), requirements=["A", "C"])

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if (found := self.checkpoint.shape(name)) != shape:
            raise ModelError(f"tensor {name!r} has shape {found}, not {shape}", _DAMAGED)


def _widened(values: Array, kind: str, name: str) -> cpu.Floats:
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if kind not in ("F32", "F16", "F64"):
        raise ModelError(f"tensor {name!r} is of type {kind}", "use F32, BF16 or F16")
    return values.astype(np.float32)


def _narrowest(values: Array) -> tuple[Array, cpu.Values]:
    """fp32 values as bits of bf16 or fp16, if all of them are such numbers."""
    flat = values.reshape(-1)
    for some in (flat[:4096], flat):  # the first few say no almost always
        if not (some.view(np.uint32) & 0xFFFF).any():
            continue
        break
    else:
        return (values.view(np.uint32) >> 16).astype(np.uint16), "bf16"
    with np.errstate(over="ignore"):
        for some in (flat[:4096], flat):
            half = some.astype(np.float16)
            if not np.array_equal(half.astype(np.float32).view(np.uint32), some.view(np.uint32)):
                return values, "fp32"
    return half.reshape(values.shape).view(np.uint16), "fp16"
