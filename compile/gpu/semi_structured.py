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
from secateur.errors import ModelError
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
    weight: Array, bits: Array | None, rule: Rule, values: Extent, nibbles: Extent
) -> tuple[Array, Array]:
    """The stored values of each group, and their nibbles.

    Args:
        weight: uint8, uint16 or uint32 ``[rows, columns]``, C-contiguous.
        bits: uint8 ``[rows, ceil(columns / 8)]``, the kept columns; None keeps what is not zero,
            -0 of 16- and 32-bit values being zero.
        rule: where the zeros of a group lie that keeps fewer than two.
        values, nibbles: shapes of the results, at least what the weight takes: half its columns,
            and two groups a byte; beyond the weight nothing is kept.

    Returns:
        The values, of weight's type, and the nibbles, uint8.

    Raises:
        ModelError: names the first row and group that keep too many.
    """
    stored = np.zeros(values, weight.dtype)
    codes = np.full(nibbles, RULES[rule][0] * 17, np.uint8)
    wrong = cpu._native().compress_groups(
        rule=RULES[rule],
        width=weight.itemsize,
        weight=weight.view(np.uint8),
        bits=bits,
        values=stored.view(np.uint8),
        nibbles=codes,
    )
    if wrong >= 0:
        raise _too_many(weight[wrong], None if bits is None else bits[wrong], wrong)
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
    if (linear.layer.pattern.n, linear.layer.pattern.m) == (2, 4) and kept.itemsize < 4:
        stored = np.zeros(values, kept.dtype)
        stored[:rows, : columns // 2] = kept.reshape(rows, -1)
        codes = np.full(nibbles, RULES[rule][0] * 17, np.uint8)
        codes[:rows, : bits.shape[1]] = _pairs(RULES[rule])[bits]
        return stored, codes
    weight = np.zeros((rows, columns), kept.dtype)
    mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(np.bool_)
    weight[mask] = kept[0]
    return compress(weight, bits, rule, values, nibbles)


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
    """
    rows, columns = shape
    size = group_size(values.itemsize)
    if columns % size:
        raise ModelError(
            f"{columns} columns are no multiple of {size}, so the weight is not of pattern "
            f"{size // 2}:{size}",
            "take it as a dense weight",
        )
    known = np.unique(RULES[rule][[3, 12] if size == 2 else RULES[rule] != 15])
    masks = np.zeros(16, np.uint8)
    for nibble in known:
        low, high = (2, 3) if nibble == 0 else (nibble & 3, nibble >> 2)
        masks[nibble] = 1 << low // 2 if size == 2 else 1 << low | 1 << high
    kept = masks[nibbles & 15] | masks[nibbles >> 4] << size
    legal = np.isin(nibbles & 15, known) & np.isin(nibbles >> 4, known)
    if not legal.all():
        raise _no_positions(int((~legal).any(axis=1).argmax()))
    if size == 2:
        kept = kept[:, 0::2] | kept[:, 1::2] << 4
    bits = np.ascontiguousarray(kept[:rows, : -(-columns // 8)])
    if columns % 8:
        bits[:, -1] &= (1 << columns % 8) - 1
    carrier = {"fp32": "float32", "int8": "int8"}.get(value_type, "uint16")
    layer = PackedLayer(
        pattern=Pattern.parse(f"{size // 2}:{size}"),
        shape=shape,
        kept=rows * columns // 2,
        per_row=columns // 2,
    )
    stored = np.ascontiguousarray(values[:rows, : columns // 2]).view(carrier)
    return pieces("weight", layer, bits, stored, scales, value_type, scale_columns)


def mask_bits(mask: Array | None) -> Array | None:
    """The bits of a keep-mask bool ``[rows, columns]``, as of `compress`."""
    return None if mask is None else np.packbits(mask, axis=1, bitorder="little")


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


def _pairs(rule: Array) -> Array:
    """Two nibbles by the mask of eight columns, uint8 ``[256]``."""
    masks = np.arange(256)
    pairs: Array = rule[masks & 15] | rule[masks >> 4] << 4
    return pairs


def _too_many(row: Array, bits: Array | None, number: int) -> ModelError:
    """The error that names the first group of a row that keeps too many."""
    size = group_size(row.itemsize)
    if bits is None:
        kept = (row if row.itemsize == 1 else row << 1) != 0
    else:
        kept = np.unpackbits(bits, count=len(row), bitorder="little").view(np.bool_)
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
