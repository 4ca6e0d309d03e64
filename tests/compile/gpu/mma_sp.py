"""What one warp's ``mma.sp`` computes from the registers of its 32 threads, in numpy.

PTX ISA 8.7, sections 9.7.14.6.1 (sparse matrix storage, sparsity selector) and 9.7.14.6.2.2
(fragments of m16n8k32 with .f16 and .bf16) and 9.7.14.6.2.6 (of m16n8k64 with .u8 and .s8). A is
16 x K with half of its columns stored, B is K x 8, D is 16 x 8. With g = lane / 4, t = lane % 4:

    A      registers of 4 bytes; of 16-bit types 8 values a_i: row g, or g + 8 for i in 2, 3, 6, 7;
           stored column 2 t + i % 2, + 8 for i > 3. Of 8-bit types 16: row g, or g + 8 for i in
           4-7, 12-15; stored column 4 t + i % 4, + 16 for i > 7.
    B      column g; row 2 t + i % 2 + 8 (i / 2) of 8 values; 4 t + i % 4 + 16 (i / 4) of 16.
    D      row g, or g + 8 for i > 1; column 2 t + i % 2.
    E      m16n8k32: of the threads t = 2 s and 2 s + 1, s being the sparsity selector, the first
           has columns 0-15, the second 16-31; row g in the low half of the word, g + 8 in the high
           one. m16n8k64: thread 0 has columns 0-31 of row g, thread 1 of row g + 8, threads 2 and 3
           columns 32-63. The lowest columns are in the lowest bits, a nibble for four columns.

Which thread has which metadata the manual shows in figures, which LLVM's test
``sparse-mma-2-4-f16.mlir`` (16-bit) and tilelang's ``mma_sp_layout.py`` (8-bit)
read them the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MEANINGFUL = {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def mma_sp(a: Array, b: Array, c: Array, e: Array, selector: int) -> Array:
    """D = A B + C.

    Args:
        a, b: of a 16-bit shape ``[32, 8]``, of an 8-bit one ``[32, 16]``: the values of each lane,
            as numbers that are summed exactly.
        c: ``[32, 4]``.
        e: uint32 ``[32]``: each lane's metadata.
        selector: the sparsity selector.

    Raises:
        ValueError: a nibble or the selector is one that leaves the result undefined.
    """
    eight = a.shape[1] == 16
    if selector not in ((0,) if eight else (0, 1)):
        raise ValueError(f"sparsity selector {selector}")
    depth = 64 if eight else 32
    nibbles = nibbles_of(e, selector, eight)
    dense = np.zeros((16, depth), a.dtype)
    per = 4 if eight else 2  # values of a register
    for i in range(a.shape[1]):
        rows = G + 8 * (i // per % 2)
        stored = T * per + i % per + (i // (2 * per)) * 4 * per
        for lane, (row, column) in enumerate(zip(rows, stored, strict=True)):
            place = int(nibbles[row, column // 2]) >> 2 * int(column % 2) & 3
            dense[row, column // 2 * 4 + place] = a[lane, i]
    full = np.zeros((depth, 8), b.dtype)
    for i in range(b.shape[1]):
        full[T * per + i % per + i // per * 4 * per, G] = b[:, i]
    product = dense @ full
    d = c.copy()
    for i in range(4):
        d[:, i] += product[G + 8 * (i // 2), 2 * T + i % 2]
    return d


def nibbles_of(e: Array, selector: int, eight: bool) -> Array:
    """The nibble of each group, ``[16, depth / 4]``, from those lanes that contribute."""
    nibbles = np.zeros((16, 16 if eight else 8), np.uint8)
    for lane, word in enumerate(e.tolist()):
        group, thread = lane // 4, lane % 4
        if eight:
            row, first, words = group + 8 * (thread % 2), 8 * (thread // 2), [(0, word, 8)]
        elif thread // 2 == selector:
            row, first, words = group, 4 * (thread % 2), [(0, word & 0xFFFF, 4), (8, word >> 16, 4)]
        else:
            continue
        for below, bits, count in words:
            for i in range(count):
                nibbles[row + below, first + i] = bits >> 4 * i & 15
    if strange := set(nibbles.reshape(-1).tolist()) - MEANINGFUL:
        raise ValueError(f"metadata of no meaning: {strange}")
    return nibbles


def fragment_a(stored: Array, per: int) -> Array:
    """The lanes' values of A, ``[16, depth / 2]`` as stored; ``per`` values a register."""
    lanes = np.zeros((32, 4 * per), stored.dtype)
    for register in range(4):
        for i in range(per):
            row = G + 8 * (register % 2)
            lanes[:, register * per + i] = stored[row, T * per + i + register // 2 * 4 * per]
    return lanes


def fragment_b(dense: Array, per: int) -> Array:
    """The lanes' values of B ``[depth, 8]``."""
    lanes = np.zeros((32, 4 * per), dense.dtype)
    for register in range(4):
        for i in range(per):
            lanes[:, register * per + i] = dense[T * per + i + register * 4 * per, G]
    return lanes


def of_d(lanes: Array) -> Array:
    """The matrix ``[16, 8]`` that the lanes' values of D are."""
    d = np.zeros((16, 8), lanes.dtype)
    for i in range(4):
        d[G + 8 * (i // 2), 2 * T + i % 2] = lanes[:, i]
    return d


def product(values: Array, meta: Array, b: Array) -> Array:
    """A B by ``mma.sp``, with the metadata loaded as CUTLASS's SM80 kernels load them.

    They copy 128 bytes at a time, of two words a row for as many rows as that makes, to shared
    memory and give lane i the i-th four bytes (``ldmatrix``). Of 16-bit types these serve 32 rows:
    the upper 16 with sparsity selector 0, the lower 16 with selector 1.

    Args:
        values: numbers, ``[rows, columns / 2]``.
        meta: int16 or int32, as `secateur.compile.gpu.sm80.Sm80` has it.
        b: numbers ``[columns, 8]``.
    """
    eight = meta.itemsize == 4
    depth, high, per = (64, 16, 4) if eight else (32, 32, 2)
    rows, columns = values.shape[0], 2 * values.shape[1]
    blocks = meta.reshape(-1).view(np.uint32).reshape(columns // depth, rows // high, 32)
    result = np.zeros((rows, 8), values.dtype)
    for top in range(0, rows, 16):
        lanes = np.zeros((32, 4), values.dtype)
        for k in range(columns // depth):
            stored = values[top : top + 16, k * depth // 2 : (k + 1) * depth // 2]
            lanes = mma_sp(
                fragment_a(stored, per),
                fragment_b(b[k * depth : (k + 1) * depth], per),
                lanes,
                blocks[k, top // high],
                top % high // 16,
            )
        result[top : top + 16] = of_d(lanes)
    return result
