"""The linears, norms and the embedding of a model directory, in the layouts of the kernels.

    packed   stored tensors, checked, in the CPU layout of their pattern
    pruned   the masks beside the weights decide what is kept, and the layout
    dense    all weights

Dense and pruned weights keep their type or are converted to one; fp32 values that all are bf16 or
fp16 numbers become these, which changes none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from secateur.artifact import MANIFEST, Manifest
from secateur.bits import unpack_bits
from secateur.checkpoint import CONFIG
from secateur.compile import cpu
from secateur.compile.config import BITMASK, LIMITS, SCALES, VALUES, PackedConfig
from secateur.compile.nearest import narrowest, pack_nibbles, round_to_nearest
from secateur.compile.stored import Array, check_headers, open_safely, pieces
from secateur.errors import ModelError, UsageError
from secateur.mapped import MappedCheckpoint
from secateur.pattern import Pattern

if TYPE_CHECKING:
    from secateur.recipe import ValueType

GROUP = 32  # columns that share a scale where dense weights are rounded at load
MASKS = "masks.safetensors"
_DAMAGED = "the model is damaged: get it again"
_STORED: dict[str, cpu.Values] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}

Activations = Literal["fp32", "int8"]
# A matrix of the kernels, whether its activations are int8, and its biases.
Part = tuple[Any, bool, cpu.Floats | None]


@dataclass(frozen=True)
class MatrixUse:
    """Weights of a model that are computed alike.

    Attributes:
        matrices: how many.
        layout, values, activations: of `CpuMatrix`.
        nbytes: of all of them.
        why: why a sparse weight is stored dense, or None.
    """

    matrices: int
    layout: str
    values: str
    activations: str
    nbytes: int
    why: str | None

    def __str__(self) -> str:
        rounded = " x int8 activations" if self.activations == "int8" else ""
        return (
            f"{self.matrices} {'matrix' if self.matrices == 1 else 'matrices'}: layout "
            f"{self.layout}, {self.values} values{rounded}, {self.nbytes / 1e6:.1f} MB"
            f"{f': {self.why}' if self.why else ''}"
        )


class Weights:
    """A model directory's weights, packed one by one as they are asked for.

    Args:
        directory: a dense, pruned or packed model.
        values: type of dense and pruned linears; None: as stored.
        head: type of the head; "auto": int8 if the linears are int8 or int4, else as stored.
        activations: what int8 and int4 values are multiplied with; None: int8.
        ready: matrices that were packed before, by module name.

    Attributes:
        checkpoint: its files.
        matrices: the matrices that were made, by module name.

    Raises:
        ModelError: a file is absent or damaged, or is not what the config says.
        UsageError: ``values`` is given, but the linears are packed.
    """

    def __init__(
        self,
        directory: str | Path,
        values: cpu.Values | None = None,
        head: cpu.Values | Literal["auto"] = "auto",
        activations: Activations | None = None,
        ready: Mapping[str, cpu.CpuMatrix] | None = None,
    ) -> None:
        self.checkpoint = MappedCheckpoint(directory)
        self.matrices: dict[str, cpu.CpuMatrix] = {}
        self._ready = ready or {}
        self._values, self._activations = values, activations
        self._packed = _packed_config(self.checkpoint)
        self._masks = _Masks(self.checkpoint)
        if self._packed is not None and values not in (None, self._packed.values):
            raise UsageError(
                f"the linears of {directory} are packed as {self._packed.values}, not {values}",
                "leave the type out, or compile the model with --values " + str(values),
            )
        linears = self._packed.values if self._packed is not None else values
        self._head = ("int8" if linears in ("int8", "int4") else None) if head == "auto" else head

    def linear(self, name: str, shape: tuple[int, int], bias: bool) -> Part:
        """The linear ``name``, ``[rows, columns]``.

        Raises:
            ModelError: names the tensor that is absent, damaged or of another shape.
        """
        if name in self._ready:
            matrix = self._ready[name]
        elif self._packed is not None and name in self._packed.layers:
            matrix = self._from_packed(name, shape, self._packed)
        else:
            bits, pattern = self._masks.of(name, shape)
            matrix = self._from_dense(name + ".weight", shape, self._values, bits, pattern)
        if (name + ".bias" in self.checkpoint) != bias:
            found = "is absent" if bias else "is there, but config.json calls for none"
            raise ModelError(f"tensor {name + '.bias'!r} {found}", _DAMAGED)
        biases = self.vector(name + ".bias", shape[0]) if bias else None
        return self._keep(name, matrix, biases)

    def head(self, tensor: str, shape: tuple[int, int]) -> Part:
        """The head, from a tensor that may be the embedding's."""
        name = tensor.removesuffix(".weight")
        if self._packed is not None and name in self._packed.layers:
            return self.linear(name, shape, bias=False)
        matrix = self._ready.get("lm_head")
        if matrix is None:
            matrix = self._from_dense(tensor, shape, self._head, None, Pattern())
        return self._keep("lm_head", matrix)

    def vector(self, name: str, length: int, offset: float = 0.0) -> cpu.Floats:
        """A norm or bias, float32 ``[length]``, with ``offset`` added."""
        self._check_shape(name, (length,))
        kind = self._kind(name)
        return _widened(_finite(name, self._values_of(name, kind), kind), kind) + np.float32(offset)

    def table(self, name: str, shape: tuple[int, int]) -> tuple[Array, str]:
        """An embedding where it lies in its file: uint8 ``[rows, bytes of a row]``, its type."""
        self._check_shape(name, shape)
        raw = self.checkpoint.array(name).view(np.uint8).reshape(shape[0], -1)
        return raw, self._kind(name)

    def report(self) -> list[MatrixUse]:
        """What computes with which layout, most matrices first."""
        counts: Counter[tuple[Any, ...]] = Counter()
        sizes: Counter[tuple[Any, ...]] = Counter()
        for matrix in self.matrices.values():
            key = (matrix.layout, matrix.value_type, matrix.activations, matrix.why)
            counts[key] += 1
            sizes[key] += matrix.nbytes
        return [
            MatrixUse(count, layout, values, activations, sizes[key], why)
            for key, count in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
            for layout, values, activations, why in [key]
        ]

    def _keep(self, name: str, matrix: cpu.CpuMatrix, biases: cpu.Floats | None = None) -> Part:
        self.matrices[name] = matrix
        return matrix._native, matrix.activations == "int8", biases

    def _from_packed(
        self, name: str, shape: tuple[int, int], config: PackedConfig
    ) -> cpu.CpuMatrix:
        layer = config.layers[name]
        if layer.shape != shape:
            raise ModelError(
                f"config.json calls {name!r} a packed linear of shape {layer.shape}, but the model "
                f"has {shape} there",
                "write the directory again with `secateur compile`",
            )
        tensors = {
            end: self._aligned(name + end)
            for end in (BITMASK, VALUES, SCALES)
            if name + end in config.stored(name)
        }
        values, kind = tensors[VALUES], config.values
        if kind not in LIMITS:
            values = _finite(name + VALUES, self._values_of(name + VALUES, kind), kind)
        bits, scales = tensors.get(BITMASK), tensors.get(SCALES)
        pieces(name, layer, bits, values, scales, kind, config.group_size)
        if kind == "fp32":
            values, kind = narrowest(values)
        matrix = self._pack(values, bits, shape, layer.pattern, kind, scales, config.group_size)
        for tensor in config.stored(name):
            self.checkpoint.release(tensor)
        return matrix

    def _from_dense(
        self,
        tensor: str,
        shape: tuple[int, int],
        wanted: cpu.Values | None,
        bits: Array | None,
        pattern: Pattern,
    ) -> cpu.CpuMatrix:
        self._check_shape(tensor, shape)
        stored = self._kind(tensor)
        weight = _finite(tensor, self._values_of(tensor, stored), stored)
        values, kind, scales = _converted(tensor, weight, stored, wanted)
        if bits is not None:
            mask = unpack_bits(bits, shape[1], pattern.rows)
            if np.count_nonzero(values) != np.count_nonzero(kept := values[mask]):
                raise ModelError(
                    f"tensor {tensor!r} is not 0 where {MASKS} says that it was removed", _DAMAGED
                )
            values = kept
        if kind == "int4":
            values = pack_nibbles(values.reshape(-1))
        matrix = self._pack(values, bits, shape, pattern, kind, scales, GROUP)
        self.checkpoint.release(tensor)
        return matrix

    def _pack(
        self,
        values: Array,
        bits: Array | None,
        shape: tuple[int, int],
        pattern: Pattern,
        kind: ValueType,
        scales: Array | None,
        group_size: int | None,
    ) -> cpu.CpuMatrix:
        integer = scales is not None and kind != "fp8"
        return cpu.pack(
            values,
            bits,
            shape,
            pattern,
            kind,
            scales=scales,
            group_size=group_size if integer else None,
            activations=self._activations if integer else None,
        )

    def _kind(self, tensor: str) -> cpu.Values:
        if (stored := self.checkpoint.dtype(tensor)) not in _STORED:
            raise ModelError(
                f"tensor {tensor!r} is of type {stored}", f"convert it to {', '.join(_STORED)}"
            )
        return _STORED[stored]

    def _values_of(self, tensor: str, kind: str) -> Array:
        """float32, or the bits of bf16 or fp16."""
        array = self._aligned(tensor)
        return array.view(np.uint16) if kind == "fp16" else array

    def _aligned(self, tensor: str) -> Array:
        return np.require(self.checkpoint.array(tensor), requirements=["A", "C"])

    def _check_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        if (found := self.checkpoint.shape(tensor)) != shape:
            raise ModelError(f"tensor {tensor!r} has shape {found}, not {shape}", _DAMAGED)


class _Masks:
    """What ``masks.safetensors`` of a pruned model says, checked."""

    def __init__(self, checkpoint: MappedCheckpoint) -> None:
        path = checkpoint.path
        pruned = (path / MANIFEST).exists() and Manifest.read(path).kind == "pruned"
        self._layers = Manifest.read(path).layers if pruned else {}
        self._file = open_safely(path / MASKS, "numpy") if pruned else None

    def of(self, name: str, shape: tuple[int, int]) -> tuple[Array | None, Pattern]:
        """The bitmask and pattern of a linear; None and dense if it was not pruned."""
        if name not in self._layers or self._layers[name].pattern == "dense":
            return None, Pattern()
        pattern = Pattern.parse(self._layers[name].pattern)
        try:
            bits: Array = self._file.get_tensor(name + ".weight")  # type: ignore[union-attr]
            if len(bits) != shape[0] // pattern.rows:
                raise ValueError(f"{len(bits)} rows of bits")
            pattern.check(unpack_bits(bits, shape[1], pattern.rows))
        except Exception as fault:  # safetensors raises its own kind
            raise ModelError(
                f"tensor {name + '.weight'!r} of {MASKS} is damaged: {fault}", _DAMAGED
            ) from fault
        return bits, pattern


def _packed_config(checkpoint: MappedCheckpoint) -> PackedConfig | None:
    content = checkpoint.config.get("quantization_config")
    if content is None:
        return None
    config = PackedConfig.parse(content, str(checkpoint.path / CONFIG))
    check_headers(checkpoint.files, config)
    return config


def _finite(tensor: str, values: Array, kind: str) -> Array:
    """The values, refused if one is NaN or infinite: its exponent is all ones."""
    if kind == "fp32":
        bits, exponent = values.view(np.uint32), 0x7F800000
    else:
        bits, exponent = values, 0x7F80 if kind == "bf16" else 0x7C00
    for piece in np.array_split(bits.reshape(-1), max(1, bits.size >> 16)):
        if ((piece & exponent) == exponent).any():
            raise ModelError(f"tensor {tensor!r} holds NaN or infinity", _DAMAGED)
    return values


def _converted(
    tensor: str, values: Array, stored: cpu.Values, wanted: cpu.Values | None
) -> tuple[Array, cpu.Values, Array | None]:
    """Values of the wanted type, their type, and the scales of integers."""
    if wanted is None:
        return (*(narrowest(values) if stored == "fp32" else (values, stored)), None)
    if wanted == stored:
        return values, stored, None
    wide = _widened(values, stored)
    if wanted in LIMITS:
        integers, scales = round_to_nearest(wide, LIMITS[wanted], GROUP)
        return integers, wanted, scales
    if wanted == "fp32":
        return wide, wanted, None
    if wanted == "bf16":
        bits = wide.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), wanted, None
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelError(
            f"tensor {tensor!r} holds {np.abs(wide).max():g}, which is too large for fp16",
            "use bf16, which has the range of fp32",
        )
    return half.view(np.uint16), wanted, None


def _widened(values: Array, kind: cpu.Values) -> cpu.Floats:
    if kind == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if kind == "fp32" else values.view(np.float16).astype(np.float32)
