"""Two of four kept: the kept values and where they were, before a GPU's own order of the metadata.

A row of a weight is cut into groups of four columns, of each of which two are stored. A *nibble*
says which: the lower position in its bits 0 and 1, the higher in bits 2 and 3. Of 32-bit values one
of two is stored, and the nibble is that of the same bytes seen as four 16-bit values. A group that
keeps fewer stores zeros (+0) at positions that a target's *rule* chooses; a group that keeps more
is refused.

Values are moved as unsigned integers: copying floats may quieten NaNs.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from secateur.compile.config import PackedLayer
from secateur.compile.stored import Pieces, pieces
from secateur.errors import ModelError
from secateur.pattern import Pattern
from secateur.recipe import ValueType

Array = np.ndarray[Any, Any]
Rule = Literal["sm80", "sm90"]

CARRIERS: dict[int, str] = {1: "uint8", 2: "uint16", 4: "uint32"}

# The nibble of each mask of a group (bit i = column i); 0 of those that keep more than two.
#   sm80: as torch's sparse_semi_structured_from_dense_cutlass chooses.
#   sm90: as CUTLASS's compressor: (i, 3), or (0, 3) for i = 3, and 0 if nothing is kept.
RULES: dict[Rule, tuple[int, ...]] = {
    "sm80": (14, 8, 9, 4, 14, 8, 9, 0, 14, 12, 13, 0, 14, 0, 0, 0),
    "sm90": (0, 12, 13, 4, 14, 8, 9, 0, 12, 12, 13, 0, 14, 0, 0, 0),
}


def carried(weight: Array) -> Array:
    """The bits of a weight as uint8, uint16 or uint32.

    Raises:
        ModelError: its elements have another size.
    """
    if weight.itemsize not in CARRIERS:
        raise ModelError(f"no sparse tensor core takes {weight.dtype}", "use --values bf16")
    return np.ascontiguousarray(weight).view(CARRIERS[weight.itemsize])


def compress(weight: Array, mask: Array | None, rule: Rule) -> tuple[Array, Array]:
    """The two stored values of each group, and their nibbles.

    Args:
        weight: uint8, uint16 or uint32 ``[rows, columns]``, columns a multiple of 4 (uint32: 2).
        mask: bool of the same shape, True = kept; None: what is not zero (-0 is zero) is kept.
        rule: where the zeros of a group lie that keeps fewer than two.

    Returns:
        values of weight's type ``[rows, columns / 2]``, nibbles uint8 ``[rows, groups]``.

    Raises:
        ModelError: names the first row and group that keep too many.
    """
    bits = 8 * weight.itemsize
    kept = (weight & ((1 << (bits - 1)) - 1) if bits > 8 else weight) != 0 if mask is None else mask
    size = 2 if bits == 32 else 4
    groups = kept.reshape(len(weight), -1, size)
    if (wrong := groups.sum(axis=2) > size // 2).any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        raise too_many(row, group, int(groups[row, group].sum()), size)
    codes = (groups << np.arange(size, dtype=np.uint8)).sum(axis=2)
    if size == 2:  # one of two: the same bytes as two of four
        codes = np.take(np.array([0, 3, 12, 15]), codes)
    nibbles = np.take(np.array(RULES[rule], np.uint8), codes)
    cut = np.where(kept, weight, 0).astype(weight.dtype).reshape(groups.shape)
    low = (nibbles & 3)[..., None].astype(np.intp)
    if size == 2:
        values = np.take_along_axis(cut, low // 2, axis=2)
    else:
        high = (nibbles >> 2)[..., None].astype(np.intp)
        values = np.take_along_axis(cut, np.concatenate([low, high], axis=2), axis=2)
    return np.ascontiguousarray(values.reshape(len(weight), -1)), nibbles


def expand(values: Array, nibbles: Array) -> Array:
    """The dense weight ``[rows, columns]`` that `compress` took apart, +0 where nothing is stored.

    Raises:
        ModelError: a nibble is not two rising positions.
    """
    legal = np.isin(nibbles, (4, 14) if values.itemsize == 4 else (4, 8, 9, 12, 13, 14))
    if values.itemsize < 4:
        legal |= nibbles == 0
    if not legal.all():
        row, group = (int(i) for i in np.argwhere(~legal)[0])
        raise ModelError(
            f"the metadata of row {row}, group {group} is {int(nibbles[row, group]):#x}, which is "
            "no pair of rising positions",
            "the packed bytes are damaged: make them again",
        )
    size = 2 if values.itemsize == 4 else 4
    dense = np.zeros((*nibbles.shape, size), values.dtype)
    low, high = (nibbles & 3).astype(np.intp), (nibbles >> 2).astype(np.intp)
    if size == 2:
        np.put_along_axis(dense, (low // 2)[..., None], values[..., None], axis=2)
    else:
        pairs = values.reshape(*nibbles.shape, 2)
        np.put_along_axis(dense, high[..., None], pairs[..., 1:], axis=2)
        # After the higher one: nibble 0 stores its value, if any, first.
        np.put_along_axis(dense, low[..., None], pairs[..., :1], axis=2)
    return dense.reshape(len(values), -1)


def dense_of(linear: Pieces) -> tuple[Array, Array]:
    """The bits of a packed linear's weight, and its mask, both ``[rows, columns]``.

    Raises:
        ModelError: its values are int4, or it keeps all of them.
    """
    if linear.bitmask is None or linear.value_type == "int4":
        found = "a dense linear" if linear.bitmask is None else "a linear of int4 values"
        raise ModelError(
            f"{found} has no 2:4 layout of a GPU", "prune it with --pattern 2:4, in bf16 or int8"
        )
    rows, columns = linear.layer.shape
    mask = np.unpackbits(linear.bitmask, axis=1, count=columns, bitorder="little").view(np.bool_)
    mask = np.repeat(mask, rows // len(mask), axis=0)
    values = carried(linear.values).reshape(-1)
    weight = np.zeros((rows, columns), values.dtype)
    weight[mask] = values
    return weight, mask


def pieces_of(
    values: Array,
    nibbles: Array,
    shape: tuple[int, int],
    value_type: ValueType,
    scales: Array | None,
    group_size: int | None,
) -> Pieces:
    """The packed linear of the stored values of a weight ``shape``; see `Sm80.to_pieces`."""
    rows, columns = shape
    size = 2 if values.itemsize == 4 else 4
    if columns % size:
        raise ModelError(
            f"{columns} columns are no multiple of {size}, so the weight is not of one pattern",
            "take it dense",
        )
    ones = np.ones_like(values)
    mask = expand(ones, np.where(nibbles == 0, RULES["sm80"][0], nibbles)) != 0
    carrier = {"fp32": "float32", "int8": "int8"}.get(value_type, "uint16")
    layer = PackedLayer(
        pattern=Pattern.parse(f"{size // 2}:{size}"),
        shape=shape,
        kept=rows * columns // 2,
        per_row=columns // 2,
    )
    return pieces(
        "weight",
        layer,
        np.packbits(mask[:rows, :columns], axis=1, bitorder="little"),
        np.ascontiguousarray(values[:rows, : columns // 2]).view(carrier),
        scales,
        value_type,
        group_size,
    )


def too_many(row: int, group: int, kept: int, size: int) -> ModelError:
    """The error that names the first group that keeps more than half."""
    return ModelError(
        f"row {row}, group {group} (columns {group * size} to {group * size + size - 1}) keeps "
        f"{kept} of {size} weights; a sparse tensor core takes {size // 2}",
        f"prune with --pattern {size // 2}:{size}",
    )
