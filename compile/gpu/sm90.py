"""The SM90 layout of 2:4: what CUTLASS 3's sparse GEMMs with ``wgmma`` of Hopper read.

    packed = sm90.from_pieces(model.pieces("model.layers.0.mlp.up_proj"), tile_k=128)
    packed.values    # uint16 [rows, columns / 2], row-major
    packed.meta      # uint8 [rows * columns / 8], rows and columns padded, in CUTLASS's order

The metadata are bytes of two nibbles. Rows are padded to 64 and columns to ``tile_k``, in whole
atoms of 64 rows by ``tile_k`` columns, down the rows first; padding is 0. The order within an atom
(`reorder`) depends on the kernel's tile: ``tile_k`` is the K of its ``MinTileShapeK``, which
CUTLASS's collective builder sets to the smaller of the tile's K and 128. Source:
``Sm90GemmSparseConfig`` in ``cutlass/gemm/collective/builders/sm90_sparse_config.inl``.
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
from secateur.errors import ModelError
from secateur.recipe import ValueType

ATOM_ROWS = 64
# By bytes of a value: what columns must be multiples of, and the tiles that there are.
MULTIPLES = {1: 32, 2: 16}
TILES = {1: (64, 128), 2: (32, 64, 128)}


@dataclass(frozen=True, slots=True)
class Sm90:
    """A 2:4 weight as SM90 reads it.

    Attributes:
        values: uint8 or uint16 ``[rows, columns / 2]``: the bits of the stored values, row-major;
            columns padded to `MULTIPLES`. They may share memory with what they were made from.
        meta: uint8, flat.
        shape: rows and columns without the padding.
        tile_k: columns of an atom.
    """

    values: Array
    meta: Array
    shape: Extent
    tile_k: int

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return int(self.values.nbytes + self.meta.nbytes)

    def to_dense(self) -> Array:
        """The bits of the weight, of the type of ``values``, ``[rows, columns]`` of ``shape``.

        Raises:
            ModelError: the metadata is not that of a 2:4 weight.
        """
        return expand(self.values, self._nibbles(), "sm90", self.shape)

    def to_pieces(
        self, value_type: ValueType, scales: Array | None = None, group_size: int | None = None
    ) -> Pieces:
        """The packed linear of pattern 2:4; zeros that fill groups are kept.

        Args:
            value_type: what the bits are: bf16, fp16, int8 or fp8.
            scales, group_size: of int8 and fp8, as `Pieces` has them.

        Raises:
            ModelError: the metadata is not that of a 2:4 weight, or the columns are no multiple
                of four.
            UsageError: the values are not of that type.
        """
        return expand_pieces(
            self.values, self._nibbles(), "sm90", self.shape, value_type, scales, group_size
        )

    def _nibbles(self) -> Array:
        shape = _extents(self.shape, self.values.itemsize, self.tile_k, True)[1]
        return restore(self.meta, shape, self.values.itemsize, self.tile_k)


def from_pieces(pieces: Pieces, *, tile_k: int = 128, pad: bool = False) -> Sm90:
    """Bring a packed linear into this layout.

    Args:
        pieces: of 8- or 16-bit values, of any pattern that keeps at most two of four.
        tile_k: one of `TILES`.
        pad: add zero columns where they are no multiple of `MULTIPLES`.

    Raises:
        ModelError: the shape or the type does not fit, or a group keeps too many (names row and
            group).
    """
    check_pieces(pieces)
    shape, itemsize = pieces.layer.shape, pieces.values.itemsize
    values, nibbles = compress_pieces(pieces, "sm90", *_extents(shape, itemsize, tile_k, pad))
    return Sm90(values, reorder(nibbles, itemsize, tile_k), shape, tile_k)


def from_dense(
    weight: Array, mask: Array | None = None, *, tile_k: int = 128, pad: bool = False
) -> Sm90:
    """Bring a dense weight into this layout.

    Args:
        weight: ``[rows, columns]`` of 1 or 2 bytes an element, taken as bits.
        mask: bool ``[rows, columns]``, True = kept; None keeps what is not zero (of 16-bit values
            -0 is zero).
        tile_k, pad: as of `from_pieces`.

    Raises:
        ModelError: as of `from_pieces`.
        ValueError: the mask is of another shape.
    """
    bits = carried(weight)
    extents = _extents(bits.shape, bits.itemsize, tile_k, pad)
    values, nibbles = compress(bits, mask, "sm90", *extents)
    return Sm90(values, reorder(nibbles, bits.itemsize, tile_k), bits.shape, tile_k)


def reorder(nibbles: Array, itemsize: int, tile_k: int) -> Array:
    """Metadata bytes ``[rows, columns / 8]``, of whole atoms, in CUTLASS's order, flat.

    An atom has 64 rows of tile_k / 8 bytes. Of 8-bit values it is stored row by row. Of 16-bit
    values, with row = 16 a + 8 b + c and byte = 4 d + 2 e + f, a byte moves to the place with the
    digits a, e, c, d, b, f.
    """
    order = _order(itemsize, tile_k)
    wide = tile_k // 8
    atoms = nibbles.reshape(-1, ATOM_ROWS, nibbles.shape[1] // wide, wide).transpose(2, 0, 1, 3)
    return np.take(atoms.reshape(-1, len(order)), order, axis=1).reshape(-1)


def restore(meta: Array, shape: Extent, itemsize: int, tile_k: int) -> Array:
    """The bytes ``shape`` that `reorder` reordered."""
    order = _order(itemsize, tile_k)
    wide = tile_k // 8
    atoms = np.take(meta.reshape(-1, len(order)), np.argsort(order), axis=1)
    return atoms.reshape(shape[1] // wide, -1, ATOM_ROWS, wide).transpose(1, 2, 0, 3).reshape(shape)


def _order(itemsize: int, tile_k: int) -> Array:
    """Which byte of an atom comes first, second, ..."""
    size = ATOM_ROWS * tile_k // 8
    if itemsize == 1:
        return np.arange(size)
    return np.arange(size).reshape(4, 2, 8, -1, 2, 2).transpose(0, 4, 2, 3, 1, 5).reshape(-1)


def _extents(shape: Extent, itemsize: int, tile_k: int, pad: bool) -> tuple[Extent, Extent]:
    """Shapes of values and nibbles."""
    if tile_k not in TILES.get(itemsize, ()):
        takes = [f"{8 * size}-bit values with tiles of {TILES[size]}" for size in sorted(TILES)]
        raise ModelError(
            f"the SM90 layout has no tile of {tile_k} columns of {8 * itemsize}-bit values",
            f"it takes {' and '.join(takes)}",
        )
    rows, columns = shape
    if not pad:
        check_shape(shape, itemsize, "SM90", 1, MULTIPLES[itemsize])
    stored = columns + -columns % MULTIPLES[itemsize]
    atoms = rows + -rows % ATOM_ROWS, (columns + -columns % tile_k) // 8
    return (rows, stored // 2), atoms
