"""The layout of a packed linear that the Triton kernels read, derived from the stored form.

The weight, padded with zeros, is cut into blocks of 4096 weights: BR rows by BK columns. With
integer values a block is one group of scales wide, else 128 columns.

    bits     uint8 [rows, columns / 8], the lowest column in the lowest bit; padded groups of 2:4
             keep their first two columns
    values   2:4: [rows, columns / 2], row by row: also the values of the SM80 layout (`sm80`).
             Other masks: those of block after block (a row of blocks after the other), each block
             row by row, from a place on that is a multiple of 16 bytes.
             bf16 and fp16 as they are; int8 as uint8 with 128 added; int4 with 8 added, two a
             byte, the first in the low half: so the kernel needs no sign extension. fp8 as it is.
    starts   int32 [blocks + 1]: where the values of a block start, in 16 bytes; not of 2:4
    scales   fp16 [columns / BK, rows], of integer values; fp32 [1, rows], of fp8

Bytes for a weight, of which a share k is kept, all patterns: bf16 and fp16 2 k + 1/8, int8
k + 1/8 + 2/G, int4 k/2 + 1/8 + 2/G (G = the group size), fp8 k + 1/8 + 4/columns: for 2:4 1.125,
0.641, 0.391 (G = 128) and 0.626 (4096 columns). To other masks than 2:4 the starts of blocks and
their padding add less than 0.005.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from secateur.compile.stored import Pieces, unpack_nibbles
from secateur.pattern import Pattern
from secateur.recipe import ValueType

Array = np.ndarray[Any, Any]

BLOCK = 4096
UNIT = 16  # bytes
_BITS: dict[ValueType, int] = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "fp8": 8}
_DTYPES: dict[ValueType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ZERO = {"int8": 128, "int4": 8}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A packed linear in this layout; see the module.

    Attributes:
        rows, columns: of the weight, without padding.
        value_type: bf16, fp16, int8, int4 or fp8.
        two_four: whether every four columns keep two.
        block_rows, block_columns: BR and BK.
    """

    rows: int
    columns: int
    value_type: ValueType
    two_four: bool
    block_rows: int
    block_columns: int
    values: torch.Tensor
    bits: torch.Tensor
    starts: torch.Tensor | None
    scales: torch.Tensor | None

    @property
    def row_blocks(self) -> int:
        """Rows of blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def column_blocks(self) -> int:
        """Blocks in a row of blocks."""
        return -(-self.columns // self.block_columns)

    @property
    def value_bits(self) -> int:
        """Of a value: 16, 8 or 4."""
        return _BITS[self.value_type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.values, self.bits, self.starts, self.scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> Blocks:
        """The same on a device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("values", "bits", "starts", "scales")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


def make_blocks(pieces: Pieces) -> Blocks:
    """Bring a packed linear into blocks, on the CPU.

    Raises:
        ValueError: its values are fp32, or no weight was removed.
    """
    if pieces.value_type not in _BITS or pieces.bitmask is None:
        raise ValueError(f"{pieces.layer.pattern} in {pieces.value_type} has no blocks")
    rows, columns = pieces.layer.shape
    width = 128 if pieces.group_size is None else pieces.group_size
    height = BLOCK // width
    two_four = pieces.layer.pattern == Pattern.parse("2:4")
    mask = np.unpackbits(pieces.bitmask, axis=1, count=columns, bitorder="little").view(np.bool_)
    mask = mask.repeat(rows // len(mask), axis=0)
    edges = ((0, -rows % height), (0, -columns % width))
    padded = np.pad(mask, edges)
    starts = scales = None
    values = _plain(pieces)
    if two_four:
        padded[rows:, :] |= np.arange(padded.shape[1]) % 4 < 2
        padded[:, columns:] |= np.arange(columns, padded.shape[1]) % 4 < 2
        values = _padded_two_four(values, pieces.value_type, (rows, columns), padded.shape)
    else:
        values, starts = _block_by_block(values, mask, padded, height, width, pieces.value_type)
    if pieces.scales is not None:
        scales = torch.from_numpy(np.ascontiguousarray(np.pad(pieces.scales, (edges[0], (0, 0))).T))
    stored = torch.from_numpy(values)
    if pieces.value_type in _DTYPES:
        stored = stored.view(_DTYPES[pieces.value_type])
    return Blocks(
        rows,
        columns,
        pieces.value_type,
        two_four,
        height,
        width,
        stored,
        torch.from_numpy(np.packbits(padded, axis=1, bitorder="little")),
        None if starts is None else torch.from_numpy(starts),
        scales,
    )


def _plain(pieces: Pieces) -> Array:
    """The kept values in order: int16 or uint8, the bits of floats; or uint8, its zero added."""
    if pieces.value_type == "fp8":
        return pieces.values.reshape(-1)
    if pieces.value_type not in _ZERO:
        return pieces.values.reshape(-1).view(np.int16)
    integers = pieces.values.reshape(-1)
    if pieces.value_type == "int4":
        integers = unpack_nibbles(integers, pieces.layer.kept)
    return (integers.astype(np.int16) + _ZERO[pieces.value_type]).astype(np.uint8)


def _padded_two_four(
    values: Array, kind: ValueType, shape: tuple[int, int], padded: tuple[int, ...]
) -> Array:
    """The values of 2:4, ``[rows, columns / 2]`` of the padded weight, padded with zeros."""
    halves = values.reshape(shape[0], shape[1] // 2)
    edges = ((0, padded[0] - shape[0]), (0, padded[1] // 2 - shape[1] // 2))
    whole = np.pad(halves, edges, constant_values=_ZERO.get(kind, 0))
    return _pairs(whole) if kind == "int4" else whole


def _block_by_block(
    values: Array, mask: Array, padded: Array, height: int, width: int, kind: ValueType
) -> tuple[Array, Array]:
    """The values in the order of blocks, and where each block starts in 16 bytes."""
    down, across = padded.shape[0] // height, padded.shape[1] // width
    counts = padded.reshape(down, height, across, width).sum(axis=(1, 3), dtype=np.int64)
    in_unit = UNIT * 8 // _BITS[kind]
    units = -(-counts.reshape(-1) // in_unit)
    starts = np.concatenate([[0], np.cumsum(units)])
    if starts[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{values.size} values are too many for one matrix")
    whole = np.full(int(starts[-1]) * in_unit, _ZERO.get(kind, 0), values.dtype)
    first = 0
    for i in range(down):
        rows = mask[i * height : (i + 1) * height]
        own = values[first : first + np.count_nonzero(rows)]
        first += len(own)
        scattered = np.zeros((height, across * width), values.dtype)
        kept = padded[i * height : (i + 1) * height]
        scattered[: len(rows), : mask.shape[1]][rows] = own
        blocks = scattered.reshape(height, across, width).transpose(1, 0, 2)
        in_order = blocks[kept.reshape(height, across, width).transpose(1, 0, 2)]
        sizes = counts[i]
        begins = starts[i * across : (i + 1) * across] * in_unit
        offset = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
        whole[offset + np.arange(len(in_order))] = in_order
    return (_pairs(whole) if kind == "int4" else whole), starts.astype(np.int32)


def _pairs(values: Array) -> Array:
    """Two values of 0 to 15 a byte along the last axis, the first in the low half."""
    pairs: Array = values[..., 0::2] | values[..., 1::2] << 4
    return pairs
