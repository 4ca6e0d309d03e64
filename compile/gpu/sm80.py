"""The SM80 layout of 2:4: what torch's CUTLASS back end and ``mma.sp`` of Ampere and later read.

    packed = sm80.from_pieces(model.pieces("model.layers.0.mlp.up_proj"))
    packed.values    # uint16 [rows, columns / 2], row-major
    packed.meta      # int16 [rows, columns / 16], in CUTLASS's order
    packed.to_dense()

The metadata words of a row hold its nibbles, the lowest columns in the lowest bits: four in an
int16 of 16- and 32-bit values, eight in an int32 of 8-bit values. Word (r, c) of the ``[rows, c]``
words lies at the flat place that `places` gives. Source: ``reorder_meta`` in CUTLASS's
``tools/util/include/cutlass/util/host_reorder.h`` and ``ColumnMajorInterleaved<2>`` in its
``layout/matrix.h``; torch's ``_semi_structured_conversions.py`` writes the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.compile.gpu.semi_structured import (
    Array,
    carried,
    compress,
    dense_of,
    expand,
    pieces_of,
)
from secateur.compile.stored import Pieces
from secateur.errors import ModelError
from secateur.recipe import ValueType

# By bytes of a value: what rows and columns must be multiples of.
MULTIPLES = {1: (16, 128), 2: (32, 64), 4: (32, 32)}


@dataclass(frozen=True, slots=True)
class Sm80:
    """A 2:4 weight as SM80 reads it (of 32-bit values 1:2).

    Attributes:
        values: uint8, uint16 or uint32 ``[rows, columns / 2]``: the bits of the stored values,
            row-major; rows and columns padded to `MULTIPLES`.
        meta: int16 ``[rows, columns / 16]`` (32-bit values: ``columns / 8``), of 8-bit values int32
            ``[rows, columns / 32]``.
        shape: rows and columns without the padding.
    """

    values: Array
    meta: Array
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return int(self.values.nbytes + self.meta.nbytes)

    def to_dense(self) -> Array:
        """The bits of the weight, of the type of ``values``, ``[rows, columns]`` of ``shape``.

        Raises:
            ModelError: the metadata is not that of a 2:4 weight.
        """
        rows, columns = self.shape
        return np.ascontiguousarray(expand(self.values, self._nibbles())[:rows, :columns])

    def to_pieces(
        self, value_type: ValueType, scales: Array | None = None, group_size: int | None = None
    ) -> Pieces:
        """The packed linear of pattern 2:4 (32-bit values: 1:2); zeros that fill groups are kept.

        Args:
            value_type: what the bits are: fp32, bf16, fp16 or int8.
            scales, group_size: of int8, as `Pieces` has them.

        Raises:
            ModelError: the metadata is not that of such a weight, or the columns are no multiple
                of four.
        """
        return pieces_of(self.values, self._nibbles(), self.shape, value_type, scales, group_size)

    def _nibbles(self) -> Array:
        words = np.empty_like(self.meta)
        words.reshape(-1)[:] = self.meta.reshape(-1)[places(self.meta.shape, self.meta.itemsize)]
        pairs = words.view(np.uint8)
        return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(words), -1)


def from_pieces(pieces: Pieces, *, pad: bool = False) -> Sm80:
    """Bring a packed linear into this layout.

    Args:
        pieces: of 8-, 16- or 32-bit values, of any pattern that keeps at most two of four
            (32-bit: one of two).
        pad: add zero rows and columns where the shape is not of `MULTIPLES`.

    Raises:
        ModelError: the shape does not fit, or a group keeps too many (names row and group).
    """
    return from_dense(*dense_of(pieces), pad=pad)


def from_dense(weight: Array, mask: Array | None = None, *, pad: bool = False) -> Sm80:
    """Bring a dense weight into this layout.

    Args:
        weight: ``[rows, columns]`` of 1, 2 or 4 bytes an element; floats are taken as bits.
        mask: bool ``[rows, columns]``, True = kept; None keeps what is not zero (-0 is zero).
        pad: as of `from_pieces`.

    Raises:
        ModelError: as of `from_pieces`.
    """
    bits = carried(weight)
    rows, columns = bits.shape
    high, wide = MULTIPLES[bits.itemsize]
    below, right = -rows % high, -columns % wide
    if (below or right) and not pad:
        raise ModelError(
            f"a {rows}x{columns} weight of {8 * bits.itemsize}-bit values does not fit the SM80 "
            f"layout, which takes multiples of {high} rows and {wide} columns",
            "pad it (pad=True), or leave this layer dense",
        )
    edges = ((0, below), (0, right))
    padded = None if mask is None else np.pad(mask, edges)
    values, nibbles = compress(np.pad(bits, edges), padded, "sm80")
    word = np.dtype(np.int32 if bits.itemsize == 1 else np.int16)
    words = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(word)
    meta = np.empty_like(words)
    meta.reshape(-1)[places(words.shape, word.itemsize)] = words.reshape(-1)
    return Sm80(values, meta, (rows, columns))


def places(shape: tuple[int, ...], itemsize: int) -> Array:
    """Where each metadata word of ``[rows, columns]``, taken row by row, lies: flat, int64.

    Args:
        shape: rows and words of a row.
        itemsize: bytes of a word, 2 or 4.
    """
    rows, columns = shape
    group, between = (32, 4) if itemsize == 2 else (16, 2)
    row, column = np.indices((rows, columns))
    row = row // group * group + row % 8 * between + row % group // 8
    swap = (row % 2 == 0).astype(np.int64) * (column % 2) - row % 2 * (column % 2 == 0)
    row, column = row + swap, column - swap
    flat: Array = (column // 2 * rows * 2 + row * 2 + column % 2).reshape(-1)
    return flat
