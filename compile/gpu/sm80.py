"""The SM80 layout of 2:4: what torch's CUTLASS back end and ``mma.sp`` of Ampere and later read.

    packed = sm80.from_pieces(model.pieces("model.layers.0.mlp.up_proj"))
    packed.values    # uint16 [rows, columns / 2], row-major
    packed.meta      # int16 [rows, columns / 16], in CUTLASS's order
    packed.to_dense()

The metadata words of a row hold its nibbles, the lowest columns in the lowest bits: four in an
int16 of 16- and 32-bit values, eight in an int32 of 8-bit values. Their order (`reorder`) is that
of ``reorder_meta`` in CUTLASS's ``tools/util/include/cutlass/util/host_reorder.h``, stored as
``ColumnMajorInterleaved<2>`` of its ``layout/matrix.h``; the bytes are those of torch's
``_semi_structured_conversions.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.compile.gpu.semi_structured import (
    Array,
    Extent,
    carried,
    check_pieces,
    check_shape,
    compress,
    compress_pieces,
    expand,
    expand_pieces,
)
from secateur.compile.stored import Pieces
from secateur.recipe import ValueType

# By bytes of a value: what rows and columns must be multiples of.
MULTIPLES = {1: (16, 128), 2: (32, 64), 4: (32, 32)}


@dataclass(frozen=True, slots=True)
class Sm80:
    """A 2:4 weight as SM80 reads it (of 32-bit values 1:2).

    Attributes:
        values: uint8, uint16 or uint32 ``[rows, columns / 2]``: the bits of the stored values,
            row-major; rows and columns padded to `MULTIPLES`. They may share memory with what they
            were made from.
        meta: int16 ``[rows, columns / 16]`` (32-bit values: ``columns / 8``), of 8-bit values int32
            ``[rows, columns / 32]``.
        shape: rows and columns without the padding.
    """

    values: Array
    meta: Array
    shape: Extent

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return int(self.values.nbytes + self.meta.nbytes)

    def to_dense(self) -> Array:
        """The bits of the weight, of the type of ``values``, ``[rows, columns]`` of ``shape``.

        Raises:
            ModelError: the metadata is not that of a 2:4 weight.
        """
        return expand(self.values, restore(self.meta).view(np.uint8), "sm80", self.shape)

    def to_pieces(
        self, value_type: ValueType, scales: Array | None = None, group_size: int | None = None
    ) -> Pieces:
        """The packed linear of pattern 2:4 (32-bit values: 1:2); zeros that fill groups are kept.

        Args:
            value_type: what the bits are: fp32, bf16, fp16, int8 or fp8.
            scales, group_size: of int8 and fp8, as `Pieces` has them.

        Raises:
            ModelError: the metadata is not that of a 2:4 weight, or the columns are no multiple
                of four (32-bit: of two).
            UsageError: the values are not of that type.
        """
        nibbles = restore(self.meta).view(np.uint8)
        return expand_pieces(
            self.values, nibbles, "sm80", self.shape, value_type, scales, group_size
        )


def from_pieces(pieces: Pieces, *, pad: bool = False) -> Sm80:
    """Bring a packed linear into this layout.

    Args:
        pieces: of 8-, 16- or 32-bit values, of any pattern that keeps at most two of four
            (32-bit: one of two).
        pad: add zero rows and columns where the shape is not of `MULTIPLES`.

    Raises:
        ModelError: the shape does not fit, or a group keeps too many (names row and group).
    """
    check_pieces(pieces)
    shape, itemsize = pieces.layer.shape, pieces.values.itemsize
    values, nibbles = compress_pieces(pieces, "sm80", *_extents(shape, itemsize, pad))
    return _of(values, nibbles, shape)


def from_dense(weight: Array, mask: Array | None = None, *, pad: bool = False) -> Sm80:
    """Bring a dense weight into this layout.

    Args:
        weight: ``[rows, columns]`` of 1, 2 or 4 bytes an element, taken as bits.
        mask: bool ``[rows, columns]``, True = kept; None keeps what is not zero (of 16- and 32-bit
            values -0 is zero).
        pad: as of `from_pieces`.

    Raises:
        ModelError: as of `from_pieces`.
        ValueError: the mask is of another shape.
    """
    bits = carried(weight)
    extents = _extents(bits.shape, bits.itemsize, pad)
    values, nibbles = compress(bits, mask, "sm80", *extents)
    return _of(values, nibbles, bits.shape)


def reorder(words: Array) -> Array:
    """Metadata words ``[rows, words of a row]`` in CUTLASS's order, of the same shape.

    Two words of 32 rows (words of 4 bytes: of 16 rows) become a block; blocks go down the rows
    first. With row = 16 b + 8 q + c (b = 0) and word t of the block, a word moves to the place with
    the digits c, b, t, q.
    """
    columns = words.shape[1]
    order = _order(words.itemsize)
    blocks = words.reshape(-1, len(order) // 2, columns // 2, 2).transpose(2, 0, 1, 3)
    return np.take(blocks.reshape(-1, len(order)), order, axis=1).reshape(words.shape)


def restore(meta: Array) -> Array:
    """The words that `reorder` reordered."""
    columns = meta.shape[1]
    order = _order(meta.itemsize)
    blocks = np.take(meta.reshape(-1, len(order)), np.argsort(order), axis=1)
    words = blocks.reshape(columns // 2, -1, len(order) // 2, 2).transpose(1, 2, 0, 3)
    return words.reshape(meta.shape)


def _order(itemsize: int) -> Array:
    """Which word of a block comes first, second, ..."""
    size = 128 // itemsize
    return np.arange(size).reshape(-1, 2, 8, 2).transpose(2, 0, 3, 1).reshape(-1)


def _extents(shape: Extent, itemsize: int, pad: bool) -> tuple[Extent, Extent]:
    """Shapes of values and nibbles."""
    high, wide = MULTIPLES[itemsize]
    if not pad:
        check_shape(shape, itemsize, "SM80", high, wide)
    rows, columns = shape[0] + -shape[0] % high, shape[1] + -shape[1] % wide
    return (rows, columns // 2), (rows, columns // (4 if itemsize == 4 else 8))


def _of(values: Array, nibbles: Array, shape: Extent) -> Sm80:
    words = nibbles.view(np.int32 if values.itemsize == 1 else np.int16)
    return Sm80(values, reorder(words), shape)
