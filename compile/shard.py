"""A packed linear cut for tensor parallelism, and several joined into one.

    rows = own(192, 96, rank=1, ranks=2)                  # range(96, 192)
    part = cut(pieces, rows, range(0, 576))               # these rows and columns of the weight
    qkv = join([q, k, v])                                 # their rows one below the other

The last two work on `Pieces`, the stored form: a cut linear can be packed like any other, and its
dense weight is the cut of the dense weight. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np

from secateur.bits import unpack_bits
from secateur.compile import e4m3
from secateur.compile.config import GROUP_SIZES, PackedLayer
from secateur.compile.stored import Array, Bools, Pieces, unpack_nibbles


def own(whole: int, size: int, rank: int, ranks: int) -> range:
    """Which of ``whole`` rows or columns process ``rank`` of ``ranks`` holds, ``size`` in a row.

    If all processes together hold more than there are, neighbours hold the same: key and value
    heads that are fewer than the processes, and layers that every process holds whole.
    """
    start = rank // max(1, size * ranks // whole) * size
    return range(start, start + size)


def cut(pieces: Pieces, rows: range, columns: range) -> Pieces:
    """The linear that holds these rows and columns of the weight only.

    Where the columns begin inside a group that shares a scale, the result has smaller groups, some
    of which repeat it.

    Raises:
        ValueError: the cut goes through a group of the pattern N:M or a block of R rows, or leaves
            no group size of the format.
    """
    layer, size = pieces.layer, pieces.group_size
    height, width = layer.pattern.rows, layer.pattern.m or 1
    for axis, step, place in (("row", height, rows), ("column", width, columns)):
        if place.start % step or place.stop % step:
            raise ValueError(
                f"a cut from {axis} {place.start} to {place.stop} goes through the groups of "
                f"{step} of its pattern {layer.pattern}"
            )
    mask = _mask(pieces)
    inside = np.zeros_like(mask)
    inside[rows.start : rows.stop, columns.start : columns.stop] = True
    here = mask[rows.start : rows.stop, columns.start : columns.stop]
    values = _flat(pieces)[inside[mask]]
    scales = None
    if pieces.scales is not None and size is not None:
        finer = _group_size(size, columns.start)
        of_column = np.arange(columns.start, columns.stop, finer) // size
        scales, size = pieces.scales[rows.start : rows.stop, of_column], finer
    elif pieces.scales is not None:
        scales = pieces.scales[rows.start : rows.stop]
    bits = None
    if pieces.bitmask is not None:
        bits = np.packbits(here[::height], axis=1, bitorder="little")
    return _made(replace(pieces, scales=scales, group_size=size), here, bits, values)


def join(parts: Sequence[Pieces]) -> Pieces:
    """One linear with the rows of all parts, in order; they are alike in the sense of `alike`."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    size = first.group_size
    scales = None
    if first.scales is not None:
        scales = np.concatenate([part.scales for part in parts if part.scales is not None])
    bits = None
    if first.bitmask is not None:
        bits = np.concatenate([part.bitmask for part in parts if part.bitmask is not None])
    values = np.concatenate([_flat(part) for part in parts])
    mask = np.concatenate([_mask(part) for part in parts])
    return _made(replace(first, scales=scales, group_size=size), mask, bits, values)


def alike(parts: Sequence[Pieces]) -> bool:
    """Whether one layout can hold all parts: columns, values, groups and kind of pattern agree."""

    def kind(part: Pieces) -> tuple[object, ...]:
        pattern = part.layer.pattern
        shared = (part.layer.shape[1], part.value_type, part.group_size)
        return (*shared, pattern.n, pattern.m, pattern.rows, pattern.is_dense)

    return len({kind(part) for part in parts}) <= 1


def dense(pieces: Pieces) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The dense weight, float32 ``[rows, columns]``; removed positions are +0.0."""
    mask, values = _mask(pieces), _flat(pieces)
    if pieces.value_type == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif pieces.value_type == "fp16":
        values = values.view(np.float16)
    elif pieces.value_type == "fp8":
        assert pieces.scales is not None
        values = e4m3.row_products(values, np.count_nonzero(mask, axis=1), pieces.scales)
    weight = np.zeros(mask.shape, np.float32)
    weight[mask] = values
    if pieces.scales is not None and pieces.group_size is not None:
        scales = np.repeat(pieces.scales.astype(np.float32), pieces.group_size, axis=1)
        weight *= scales[:, : mask.shape[1]]
        weight[~mask] = 0.0
    return weight


def _made(form: Pieces, mask: Bools, bits: Array | None, values: Array) -> Pieces:
    """``form`` with another mask and other values, all kept ones in order."""
    counts = np.count_nonzero(mask, axis=1)
    kept, per_row = int(counts.sum()), int(counts[0]) if (counts == counts[0]).all() else None
    rows, columns = mask.shape
    layer = PackedLayer(
        pattern=form.layer.pattern, shape=(rows, columns), kept=kept, per_row=per_row
    )
    if form.value_type == "int4":
        values = _pack_nibbles(values)
    elif per_row is not None:
        values = values.reshape(rows, per_row)
    return replace(form, layer=layer, bitmask=bits, values=values)


def _mask(pieces: Pieces) -> Bools:
    """The keep-mask, bool ``[rows, columns]``."""
    if pieces.bitmask is None:
        return np.ones(pieces.layer.shape, np.bool_)
    return unpack_bits(pieces.bitmask, pieces.layer.shape[1], pieces.layer.pattern.rows)


def _flat(pieces: Pieces) -> Array:
    """The kept values in order, ``[kept]``; of int4 as int8."""
    if pieces.value_type == "int4":
        return unpack_nibbles(pieces.values, pieces.layer.kept)
    return pieces.values.reshape(-1)


def _pack_nibbles(values: Array) -> Array:
    """`secateur.compile.bitmask.pack_nibbles` without torch."""
    pairs = np.zeros(-(-len(values) // 2) * 2, np.uint8)
    pairs[: len(values)] = values.view(np.uint8) & 15
    packed: Array = pairs[::2] | (pairs[1::2] << 4)
    return packed


def _group_size(size: int, start: int) -> int:
    """The largest group size whose groups, counted from this column on, lie in those of ``size``.

    The last group may have fewer columns, so it does not matter where the cut ends.
    """
    fits = gcd(size, start)
    for known in sorted(GROUP_SIZES, reverse=True):
        if fits % known == 0:
            return known
    raise ValueError(f"a cut at column {start} goes through a group of {size} that shares a scale")
