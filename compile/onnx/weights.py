"""How each weight is stored in the graph.

bitmask             bits and kept values, expanded when the model is opened; integers become bytes
                    or nibbles for MatMulNBits
dense               the weight; integers have DequantizeLinear: standard ops
sparse-initializer  values and their places; see `secateur.compile.onnx.sparse`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from secateur.bits import pack_mask
from secateur.compile.onnx.graph import Stored
from secateur.compile.quantize import Quantised
from secateur.recipe import ValueType

Storage = Literal["bitmask", "sparse-initializer", "dense"]
STORAGES: tuple[Storage, ...] = ("bitmask", "sparse-initializer", "dense")
_TYPES: dict[ValueType, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}

Load = Callable[[], torch.Tensor]
LoadIntegers = Callable[[], Quantised]


def plain(name: str, load: Load, shape: tuple[int, ...], values: ValueType) -> Stored:
    """A tensor of floats as it is."""
    return Stored({"": _lazy(name, _TYPES[values], shape, load)})


def bitmask(
    name: str, load: Load, mask: Load, kept: int, shape: tuple[int, ...], values: ValueType
) -> Stored:
    """Bits and kept floats.

    Args:
        name: of the weight.
        load: its dense form ``shape``.
        mask: bool ``shape``, True = kept.
        kept: how many are kept.
        shape: rows and columns.
        values: type of the kept values.
    """
    rows, columns = shape

    def gather() -> torch.Tensor:
        weight = load()
        return torch.cat([torch.zeros(1, dtype=weight.dtype), weight[mask()]])

    bits = _lazy(name, ir.DataType.UINT8, (rows, -(-columns // 8)), lambda: pack_mask(mask()))
    numbers = _lazy(name, _TYPES[values], (kept + 1,), gather)
    return Stored({".bits": bits, ".kept": numbers}, "BitmaskWeight", (columns,))


def bitmask_integers(
    name: str,
    load: LoadIntegers,
    mask: Load,
    kept: int,
    shape: tuple[int, int],
    group: int,
    width: int,
) -> Stored:
    """Bits and kept integers of 8 or 4 bits (``width``) for MatMulNBits; see `bitmask`."""
    rows, columns = shape
    groups = -(-columns // group)

    def padded() -> torch.Tensor:
        return torch.nn.functional.pad(mask(), (0, groups * group - columns))

    def gather() -> torch.Tensor:
        codes = load().values[mask()].to(torch.int16) + (1 << width - 1)
        codes = torch.cat([codes.new_tensor([1 << width - 1]), codes]).to(torch.uint8)
        if width == 8:
            return codes
        codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        return codes[::2] | codes[1::2] << 4

    bits = _lazy(name, ir.DataType.UINT8, (rows, groups * group // 8), lambda: pack_mask(padded()))
    size = kept + 1 if width == 8 else -(-(kept + 1) // 2)
    return Stored(
        {".bits": bits, ".kept": _lazy(name, ir.DataType.UINT8, (size,), gather)},
        f"BitmaskInt{width}",
        (rows, groups, group * width // 8),
        scales=_scales(name, load, (rows, groups)),
        group=group,
        bits=width,
    )


def dense_integers(
    name: str, load: LoadIntegers, shape: tuple[int, int], group: int, width: int
) -> Stored:
    """All integers, of 8 or 4 bits, and scales for DequantizeLinear."""
    kind = ir.DataType.INT8 if width == 8 else ir.DataType.INT4

    def tensor() -> ir.TensorProtocol:
        values = load().values.numpy()
        if width == 4:
            values = values.astype(ml_dtypes.int4)
        return ir.Tensor(np.ascontiguousarray(values), dtype=kind, name=name)

    scales = _scales(name, load, (shape[0], -(-shape[1] // group)))
    lazy = ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(shape), name=name)
    return Stored({"": lazy}, scales=scales, group=group)


def _scales(name: str, load: LoadIntegers, shape: tuple[int, int]) -> ir.TensorProtocol:
    return _lazy(name, ir.DataType.FLOAT16, shape, lambda: load().scales)


def _lazy(name: str, kind: ir.DataType, shape: tuple[int, ...], load: Load) -> ir.TensorProtocol:
    """A tensor that is read when the file is written."""

    def tensor() -> ir.TensorProtocol:
        return TorchTensor(load().contiguous(), name=name)

    return ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(shape), name=name)
