"""Two of four kept: the stored values and where they were, before any GPU's own order.

A row of a weight is cut into groups of four columns, of each of which two values are stored. A
*nibble* says which: the lower position in its bits 0 and 1, the higher in bits 2 and 3; two nibbles
make a byte, the lower columns in its lower half. Of 32-bit values one of two is stored, and the
nibble is that of the same bytes taken as four 16-bit values. A group that keeps fewer stores zeros
(+0) at positions that a target's *rule* chooses; a group that keeps more is refused.

Values are moved as unsigned integers: copying floats may quieten NaNs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from secateur.compile import cpu
from secateur.compile.config import PackedLayer
from secateur.compile.stored import Pieces, pieces
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.recipe import ValueType

Array = np.ndarray[Any, Any]
Rule = Literal["sm80", "sm90"]
Extent = tuple[int, int]

CARRIERS: dict[int, str] = {1: "uint8", 2: "uint16", 4: "uint32"}

# The nibble of each mask of a group (bit i = column i); 15: it keeps too many.
#   sm80: as torch's sparse_semi_structured_from_dense_cutlass chooses.
#   sm90: as CUTLASS's compressor: (i, 3), or (0, 3) for i = 3, and 0 if nothing is kept.
RULES: dict[Rule, Array] = {
    "sm80": np.array([14, 8, 9, 4, 14, 8, 9, 15, 14, 12, 13, 15, 14, 15, 15, 15], np.uint8),
    "sm90": np.array([0, 12, 13, 4, 14, 8, 9, 15, 12, 12, 13, 15, 14, 15, 15, 15], np.uint8),
}


def carried(weight: Array) -> Array:
    """The bits of a weight, C-contiguous, as uint8, uint16 or uint32.

    Raises:
        ModelError: it is no matrix, or its elements have another size.
    """
    if weight.ndim != 2 or weight.itemsize not in CARRIERS:
        raise ModelError(
            f"no sparse tensor core takes {weight.dtype} of {weight.ndim} axes",
            "use a matrix of 8-, 16- or 32-bit values",
        )
    return np.ascontiguousarray(weight).view(CARRIERS[weight.itemsize])


def group_size(itemsize: int) -> int:
    """Columns of a group, of which half are stored, by bytes of a value."""
    return 2 if itemsize == 4 else 4


def compress(
    weight: Array,
    mask: Array | None,
    rule: Rule,
    values: Extent | None = None,
    nibbles: Extent | None = None,
) -> tuple[Array, Array]:
    """The stored values of each group, and their nibbles.

    Args:
        weight: uint8, uint16 or uint32 ``[rows, columns]``, C-contiguous.
        mask: bool of the same shape, True = kept; None keeps what is not zero, -0 of 16- and 32-bit
            values being zero.
        rule: where the zeros of a group lie that keeps fewer than two.
        values, nibbles: shapes of the results, in which the weight's own stand in the corner;
            beyond it nothing is kept. None: its own, if 16 divides the bytes of a row.

    Returns:
        The values, of weight's type ``[rows, columns / 2]``, and the nibbles, two in a byte, uint8
        ``[rows, columns / 8]`` (of 32-bit values ``columns / 4``).

    Raises:
        ModelError: names the first row and group that keep too many.
        ValueError: the mask or the results have a shape that does not fit.
    """
    rows, columns = weight.shape
    stored = np.zeros(values or (rows, columns // 2), weight.dtype)
    shape = nibbles or (rows, columns // (2 * group_size(weight.itemsize)))
    codes = np.full(shape, RULES[rule][0] * 17, np.uint8)
    wrong = cpu._native().compress_groups(
        rule=RULES[rule],
        width=weight.itemsize,
        weight=weight.view(np.uint8),
        bits=None if mask is None else np.packbits(mask, axis=1, bitorder="little"),
        values=stored.view(np.uint8),
        nibbles=codes,
    )
    if wrong >= 0:
        raise _too_many(weight[wrong], None if mask is None else mask[wrong], wrong)
    return stored, codes


def compress_pieces(
    linear: Pieces, rule: Rule, values: Extent, nibbles: Extent
) -> tuple[Array, Array]:
    """`compress` of a packed linear.

    Raises:
        ModelError: a group keeps too many.
    """
    assert linear.bitmask is not None
    rows, columns = linear.layer.shape
    bits = np.repeat(linear.bitmask, rows // len(linear.bitmask), axis=0)
    kept = carried(linear.values.reshape(1, -1))
    size = group_size(kept.itemsize)
    if (linear.layer.pattern.n, linear.layer.pattern.m) == (size // 2, size):
        if size == 2:
            bits = np.stack([bits & 15, bits >> 4], axis=2).reshape(rows, -1)[:, : -(-columns // 4)]
        pairs = _pairs(rule, size)
        codes = _padded(np.take(pairs, bits), nibbles, int(pairs[0]))
        return _padded(kept.reshape(rows, -1), values, 0), codes
    weight = np.zeros((rows, columns), kept.dtype)
    mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(np.bool_)
    weight[mask] = kept[0]
    return compress(weight, mask, rule, values, nibbles)


def expand(values: Array, nibbles: Array, rule: Rule, shape: Extent) -> Array:
    """The dense weight ``shape`` that `compress` took apart, +0 where nothing is stored.

    Raises:
        ModelError: names the first row with a nibble that the rule does not know.
    """
    weight = np.empty(shape, values.dtype)
    wrong = cpu._native().expand_groups(
        rule=RULES[rule],
        width=values.itemsize,
        values=values.view(np.uint8),
        nibbles=nibbles,
        weight=weight.view(np.uint8),
    )
    if wrong >= 0:
        raise _no_positions(wrong)
    return weight


def expand_pieces(
    values: Array,
    nibbles: Array,
    rule: Rule,
    shape: Extent,
    value_type: ValueType,
    scales: Array | None,
    scale_columns: int | None,
) -> Pieces:
    """The packed linear, of pattern 2:4 or 1:2, that `compress_pieces` took apart.

    Raises:
        ModelError: names the first row with a nibble that the rule does not know; or the columns
            are no multiple of a group.
        UsageError: the values are not of that type.
    """
    rows, columns = shape
    size = group_size(values.itemsize)
    carriers: dict[ValueType, str] = {"fp32": "float32", "int8": "int8", "fp8": "uint8"}
    carrier = np.dtype(carriers.get(value_type, "uint16"))
    if carrier.itemsize != values.itemsize:
        raise UsageError(
            f"values of {8 * values.itemsize} bits are not {value_type}",
            f"name a type of {8 * values.itemsize} bits",
        )
    if columns % size:
        raise ModelError(
            f"{columns} columns are no multiple of {size}, so the weight is not of pattern "
            f"{size // 2}:{size}",
            "take it as a dense weight",
        )
    kept = np.take(_masks(rule, size), nibbles[:rows, : -(-columns // (2 * size))])
    if not kept.all():
        raise _no_positions(int((kept == 0).any(axis=1).argmax()))
    if size == 2:
        kept = np.pad(kept, ((0, 0), (0, kept.shape[1] % 2)))
        kept = kept[:, 0::2] | kept[:, 1::2] << 4
    if columns % 8:
        kept[:, -1] &= (1 << columns % 8) - 1
    layer = PackedLayer(
        pattern=Pattern.parse(f"{size // 2}:{size}"),
        shape=shape,
        kept=rows * columns // 2,
        per_row=columns // 2,
    )
    stored = np.ascontiguousarray(values[:rows, : columns // 2]).view(carrier)
    return pieces("weight", layer, kept, stored, scales, value_type, scale_columns)


def check_shape(shape: Sequence[int], itemsize: int, target: str, high: int, wide: int) -> None:
    """Refuse a shape that is no multiple of ``high`` rows and ``wide`` columns.

    Raises:
        ModelError: says what the target takes.
    """
    rows, columns = shape
    if rows % high or columns % wide:
        raise ModelError(
            f"a {rows}x{columns} weight of {8 * itemsize}-bit values does not fit the {target} "
            f"layout, which takes multiples of {high} rows and {wide} columns",
            "pad it (pad=True), or leave this layer dense",
        )


def check_pieces(linear: Pieces) -> None:
    """Refuse a packed linear that is of int4 values, or keeps all of them.

    Raises:
        ModelError: says which.
    """
    if linear.bitmask is None or linear.value_type == "int4":
        found = "a dense linear" if linear.bitmask is None else "a linear of int4 values"
        raise ModelError(
            f"{found} has no 2:4 layout of a GPU", "prune it with --pattern 2:4, in bf16 or int8"
        )


def _padded(array: Array, shape: Extent, fill: int) -> Array:
    """The array itself, or a larger one with it in the corner."""
    if array.shape == shape:
        return array
    larger = np.full(shape, fill, array.dtype)
    larger[: array.shape[0], : array.shape[1]] = array
    return larger


def _pairs(rule: Rule, size: int) -> Array:
    """Two nibbles by the mask of two groups."""
    masks = np.arange(1 << 2 * size)
    low, high = masks & (1 << size) - 1, masks >> size
    if size == 2:
        low, high = (own % 2 * 3 | own // 2 * 12 for own in (low, high))
    pairs: Array = RULES[rule][low] | RULES[rule][high] << 4
    return pairs


def _masks(rule: Rule, size: int) -> Array:
    """The kept columns by two nibbles, uint8 ``[256]``; 0 where one is none of the rule's."""
    masks = np.zeros(16, np.uint8)
    for nibble in RULES[rule][[3, 12]] if size == 2 else RULES[rule]:
        low, high = (2, 3) if nibble == 0 else (nibble & 3, nibble >> 2)
        masks[nibble] = 1 << low // 2 if size == 2 else 1 << low | 1 << high
    masks[15] = 0  # a group that keeps too many
    pairs = np.arange(256)
    low, high = masks[pairs & 15], masks[pairs >> 4]
    return np.where((low != 0) & (high != 0), low | high << size, 0).astype(np.uint8)


def _too_many(row: Array, mask: Array | None, number: int) -> ModelError:
    """The error that names the first group of a row that keeps too many."""
    size = group_size(row.itemsize)
    kept = mask if mask is not None else (row if row.itemsize == 1 else row << 1) != 0
    counts = np.pad(kept, (0, -len(row) % size)).reshape(-1, size).sum(axis=1)
    group = int((counts > size // 2).argmax())
    return ModelError(
        f"row {number}, group {group} (columns {group * size} to {group * size + size - 1}) keeps "
        f"{counts[group]} of {size} weights; a sparse tensor core takes {size // 2}",
        f"prune with --pattern {size // 2}:{size}",
    )


def _no_positions(row: int) -> ModelError:
    return ModelError(
        f"the metadata of row {row} holds a nibble that is no pair of rising positions",
        "the bytes are damaged, or of another layout: make them again",
    )
