"""The sparse forms of compressed-tensors: ``sparse-24-bitmask`` and ``sparse-bitmask``.

A weight ``[rows, columns]`` of any type becomes, in place of ``P.weight``,

    P.compressed   its kept elements in row-major order:
                   24: [rows, columns / 2]; else [kept]
    P.bitmask      uint8 [rows, ceil(columns / 8)], the bits of `secateur.bits`
    P.shape        int64: 24: [2, 1]; else [2]
    P.row_offsets  int64 [rows], kept elements before each row; not of 24

``sparse-24-bitmask`` keeps exactly two of four. compressed-tensors takes the two largest, which
leaves open where zeros stand in a group that has fewer others; here the mask says it.
``sparse-bitmask`` keeps what is not zero, and -0 is zero. Until version 0.8.1 it applied to every
parameter, vectors too, under the parameter's own name: ``P.weight.compressed``.

Source: ``compressors/sparse_compressors`` of compressed-tensors 0.13 and 0.8.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.bits import pack_mask, unpack_mask
from secateur.compile.bitmask import expand, nonzero, pack_values
from secateur.errors import ModelError
from secateur.pattern import Pattern

COMPRESSED, BITMASK, SHAPE, OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"
ENDS = (COMPRESSED, BITMASK, SHAPE, OFFSETS)
TWO_OF_FOUR = Pattern.parse("2:4")
_LARGEST = 1 << 40  # more elements than this are a damaged shape


def encode_two_of_four(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of ``sparse-24-bitmask`` by the end of their names.

    Args:
        weight: ``[rows, columns]``, of any type.
        mask: bool ``[rows, columns]``, True = kept: two of every four columns.
    """
    return {
        COMPRESSED: pack_values(weight, mask),
        BITMASK: pack_mask(mask),
        SHAPE: torch.tensor(weight.shape).reshape(-1, 1),
    }


def encode_nonzero(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of ``sparse-bitmask`` by the end of their names.

    Args:
        weight: ``[columns]`` or ``[rows, columns]``, of any type.
    """
    kept = nonzero(weight)
    counts = kept.sum(dim=-1)
    columns = weight.shape[-1]
    bits = pack_mask(kept.view(-1, columns))
    return {
        COMPRESSED: pack_values(weight.view(-1, columns), kept.view(-1, columns)).reshape(-1),
        BITMASK: bits.view(*weight.shape[:-1], bits.shape[1]),
        SHAPE: torch.tensor(weight.shape),
        OFFSETS: counts.cumsum(0) - counts,
    }


def decode(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight, or vector, that the tensors of either form stand for; zeros are +0.

    Args:
        name: of the stored tensors without their ends, for errors.
        tensors: by the end of their names; ``.row_offsets`` tells the forms apart.

    Raises:
        ModelError: names the tensor, if it is absent or its type, shape, bits or numbers do not
            agree with the others.
    """
    for end in ENDS[:3]:
        if end not in tensors:
            raise ModelError(f"the checkpoint has no tensor {name + end!r}", _COPY_AGAIN)
    shape = _shape_of(name, tensors[SHAPE])
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape
    bits, values = tensors[BITMASK], tensors[COMPRESSED]
    width = -(-columns // 8)
    _expect(name + BITMASK, bits, torch.uint8, (*shape[:-1], width))
    try:
        mask = unpack_mask(bits.view(rows, width), columns)
    except ValueError as fault:
        raise _damaged(name + BITMASK, str(fault)) from fault
    if OFFSETS in tensors:
        counts = mask.view(shape).sum(dim=-1)
        _expect(name + COMPRESSED, values, None, (int(counts.sum()),))
        _expect(name + OFFSETS, tensors[OFFSETS], torch.int64, shape[:-1])
        if not torch.equal(tensors[OFFSETS], counts.cumsum(0) - counts):
            raise _damaged(name + OFFSETS, "it does not count the bits of the rows before")
    else:
        _expect(name + COMPRESSED, values, None, (rows, columns // 2))
        try:
            TWO_OF_FOUR.check(mask)
        except ValueError as fault:
            raise _damaged(name + BITMASK, str(fault)) from fault
    return expand(values, mask).view(shape)


def _shape_of(name: str, stored: torch.Tensor) -> tuple[int, ...]:
    """``[columns]`` or ``[rows, columns]``, from a column or row of int64."""
    extents = stored.flatten().tolist()
    if stored.dtype != torch.int64 or len(extents) not in (1, 2):
        raise _damaged(name + SHAPE, f"it is {stored.dtype} of shape {tuple(stored.shape)}")
    if min(extents) < 1 or max(extents) > _LARGEST:
        raise _damaged(name + SHAPE, f"it says {extents}")
    return tuple(extents)


def _expect(
    tensor: str, found: torch.Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    if tuple(found.shape) != shape:
        raise _damaged(tensor, f"shape {tuple(found.shape)}, not {shape}")
    if dtype is not None and found.dtype != dtype:
        raise _damaged(tensor, f"type {found.dtype}, not {dtype}")


_COPY_AGAIN = "get the checkpoint again"


def _damaged(tensor: str, why: str) -> ModelError:
    return ModelError(f"tensor {tensor!r} is damaged: {why}", _COPY_AGAIN)
