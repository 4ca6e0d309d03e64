"""marlin-24: 2:4 weights of 4 or 8 bits in the order that the Sparse-Marlin kernel read them.

A linear of N outputs and K inputs, its integers q symmetric, is three tensors:

    weight  int32 [K/32, 16 N / pf]   pf = 32 / bits integers a word
    meta    int16 [K/32, 2 N]         which two of four columns are stored
    scales  fp16  [K/128, N] or [1, N]

``meta`` holds the words of torch's semi-structured form, ``[N, K/16]``, in an order of its own that
is not torch's (`_places`). ``weight`` holds the stored values, ``[K/2, N]`` after a transposition,
plus 2^(bits - 1): cut into tiles of 16 x 16, taken 1024 at a time in the order of `_order`, and
packed with the first of each pf in the lowest bits. Scales of groups are reordered by 64.

Source: ``Marlin24Compressor`` of compressed-tensors (0.13 and before), which could only write, and
``gptq_marlin_24`` of vLLM (until January 2026), whose GPTQ checkpoints call the tensors ``B_24``,
``B_meta`` and ``s``. They differ in one place: compressed-tensors compares the group with half of
K, and so leaves the scales of K = 256 in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from secateur.compile.gpu.semi_structured import compress, expand

Array = np.ndarray[Any, Any]

GROUP = 128  # columns that share a scale, if not all do
_TILE = 16
# Of eight int4, or four int8, of a word: which come first.
_INTERLEAVED = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SCALES = (np.arange(0, 64, 8)[:, None] + np.array([0, 4, 1, 5, 2, 6, 3, 7])).ravel()


@dataclass(frozen=True, slots=True)
class Marlin24:
    """A linear as marlin-24 stores it.

    Attributes:
        weight: int32 ``[K/32, 16 N / pf]``.
        meta: int16 ``[K/32, 2 N]``.
        scales: fp16 ``[K/128, N]``, or ``[1, N]`` of whole rows.
    """

    weight: Array
    meta: Array
    scales: Array


def obstacle(rows: int, columns: int) -> str | None:
    """Why a ``[rows, columns]`` weight has no such form that the kernel took, or None."""
    if rows % 128 or columns % 128:
        return f"marlin-24 takes multiples of 128 rows and columns, not {rows}x{columns}"
    return None


def pack(values: Array, scales: Array, bits: int, *, gptq: bool = False) -> Marlin24:
    """Bring a 2:4 weight into this form.

    Args:
        values: int8 ``[N, K]``, N a multiple of 64 and K of 32: -2^(bits - 1) to
            2^(bits - 1) - 1, at most two of four not 0.
        scales: fp16 ``[N, K/128]`` or ``[N, 1]``.
        bits: 4 or 8.
        gptq: as GPTQ checkpoints have the scales.

    Raises:
        ModelError: a group of four keeps more than two.
    """
    rows, columns = values.shape
    kept, nibbles = compress(np.ascontiguousarray(values).view(np.uint8), values != 0, "sm80")
    meta = np.empty(rows * columns // 16, np.uint16)
    meta[_places(rows, columns // 16)] = nibbles.view(np.uint16)
    stored = kept.view(np.int8).T.astype(np.int16) + np.int16(1 << (bits - 1))
    tiles = stored.reshape(columns // 32, _TILE, rows // _TILE, _TILE).transpose(0, 2, 1, 3)
    ordered = tiles.reshape(-1, 1024)[:, _order(bits)].reshape(columns // 32, -1)
    words = np.zeros((len(ordered), ordered.shape[1] * bits // 32), np.uint32)
    for i in range(32 // bits):
        words |= ordered[:, i :: 32 // bits].astype(np.uint32) << np.uint32(bits * i)
    wide = scales.T
    if _reordered(wide.shape[0], columns, gptq):
        wide = wide.reshape(-1, 64)[:, _SCALES]
    return Marlin24(
        words.view(np.int32),
        meta.view(np.int16).reshape(columns // 32, rows * 2),
        np.ascontiguousarray(wide.reshape(-1, rows)),
    )


def unpack(packed: Marlin24, *, gptq: bool = False) -> tuple[Array, Array, int]:
    """The integers int8 ``[N, K]``, their scales fp16 ``[N, K/128]`` or ``[N, 1]``, and the bits.

    Raises:
        ValueError: the three tensors are not of one weight.
        ModelError: the metadata is not that of a 2:4 weight.
    """
    rows, columns, bits = _measures(packed)
    per_word = 32 // bits
    ordered = np.empty((columns // 32, _TILE * rows), np.int16)
    for i in range(per_word):
        ordered[:, i::per_word] = packed.weight.view(np.uint32) >> np.uint32(bits * i) & (
            (1 << bits) - 1
        )
    tiles = np.empty((ordered.size // 1024, 1024), np.int16)
    tiles[:, _order(bits)] = ordered.reshape(-1, 1024)
    tiles -= 1 << (bits - 1)
    cut = tiles.reshape(columns // 32, rows // _TILE, _TILE, _TILE).transpose(0, 2, 1, 3)
    values = np.ascontiguousarray(cut.reshape(columns // 2, rows).T.astype(np.int8))
    words = packed.meta.reshape(-1).view(np.uint16)[_places(rows, columns // 16)]
    nibbles = np.ascontiguousarray(words).view(np.uint8)
    dense = expand(values.view(np.uint8), nibbles, "sm80", (rows, columns))
    scales = packed.scales
    if _reordered(len(scales), columns, gptq):
        flat = np.empty((scales.size // 64, 64), scales.dtype)
        flat[:, _SCALES] = scales.reshape(-1, 64)
        scales = flat.reshape(scales.shape)
    return dense.view(np.int8), np.ascontiguousarray(scales.T), bits


def _measures(packed: Marlin24) -> tuple[int, int, int]:
    """N, K and the bits, checked against every shape and type."""
    weight, meta, scales = packed.weight, packed.meta, packed.scales
    types = [str(tensor.dtype) for tensor in (weight, meta, scales)]
    if types != ["int32", "int16", "float16"] or any(
        tensor.ndim != 2 for tensor in (weight, meta, scales)
    ):
        raise ValueError(f"weight, meta and scales are {', '.join(types)}, or not matrices")
    rows, columns = meta.shape[1] // 2, 32 * len(meta)
    if not meta.size or meta.shape[1] % 128:
        raise ValueError(f"meta of shape {meta.shape} is of no weight with a multiple of 64 rows")
    bits = {2 * rows: 4, 4 * rows: 8}.get(weight.shape[1])
    if bits is None or len(weight) != len(meta):
        raise ValueError(f"weight of shape {weight.shape} beside meta of shape {meta.shape}")
    groups = len(scales)
    whole = groups == 1 or (columns % GROUP == 0 and groups == columns // GROUP)
    if scales.shape[1] != rows or not whole or (groups > 1 and scales.size % 64):
        raise ValueError(f"scales of shape {scales.shape} for {rows} rows and {columns} columns")
    return rows, columns, bits


def _reordered(groups: int, columns: int, gptq: bool) -> bool:
    return groups > 1 and (gptq or columns // 2 > GROUP)


def _places(rows: int, words: int) -> Array:
    """Where the metadata words of ``[rows, words]`` lie: flat, int64 ``[rows, words]``."""
    row, word = np.indices((rows, words))
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    step = (row % 2 == 0).astype(np.int64) * (word % 2) - row % 2 * (word % 2 == 0)
    row, word = row + step, word - step
    flat: Array = word // 2 * rows * 2 + row * 2 + word % 2
    return flat


@cache
def _order(bits: int) -> Array:
    """Which of 1024 stored values, four tiles, come first; int64 ``[1024]``."""
    order = []
    for lane in range(32):
        column = lane // 4
        pair = 2 * (lane % 4)
        places = [
            16 * row + column // 2 * 256 + 8 * (column % 2) + 4 * block
            for block in (0, 1)
            for row in (pair, pair + 1, pair + 8, pair + 9)
        ]
        order += [place + j for j in range(4) for place in places]
    mixed = np.array(_INTERLEAVED[bits])
    return np.array(order).reshape(-1, len(mixed))[:, mixed].ravel()
