"""Random weights of two of four, and what becomes of their groups, one group at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32}

# What torch's from_dense chooses for groups that keep fewer than two; see the comment in its
# _semi_structured_conversions.py.
TORCH = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}


def draw(
    rng: np.random.Generator, shape: tuple[int, int], itemsize: int, fill: float
) -> tuple[Array, Array]:
    """Weights of random bits, none of them zero, and a mask.

    Of each group of four (4 bytes: of two) half are chosen and kept with probability ``fill``.
    """
    size = 2 if itemsize == 4 else 4
    rows, columns = shape
    order = rng.random((rows, -(-columns // size), size)).argsort(axis=2)
    mask = (order < size // 2) & (rng.random(order.shape) < fill)
    weight = rng.integers(1, 1 << 8 * itemsize, shape, dtype=np.uint64).astype(CARRIERS[itemsize])
    if itemsize > 1:
        weight[weight == 1 << 8 * itemsize - 1] = 1  # -0
    return weight, mask.reshape(rows, -1)[:, :columns]


def positions(kept: list[int], rule: str) -> tuple[int, int]:
    """The positions that a group of four stores, if it keeps these."""
    if len(kept) == 2:
        return kept[0], kept[1]
    if rule == "torch":
        return TORCH[tuple(kept)]
    if not kept:
        return 0, 0
    return (kept[0], 3) if kept[0] < 3 else (0, 3)


def compress(weight: Array, mask: Array, rule: str) -> tuple[Array, Array]:
    """Stored values ``[rows, columns / 2]``, and nibbles ``[rows, groups]``."""
    size = 2 if weight.itemsize == 4 else 4
    rows, columns = weight.shape
    values = np.zeros((rows, columns // 2), weight.dtype)
    nibbles = np.zeros((rows, columns // size), np.uint8)
    for row in range(rows):
        for group in range(columns // size):
            own = range(group * size, group * size + size)
            kept = [i for i, column in enumerate(own) if mask[row, column]]
            if size == 2:
                first = kept == [0]
                nibbles[row, group] = 0b0100 if first else 0b1110
                stored = [0 if first else 1]
            else:
                low, high = positions(kept, rule)
                nibbles[row, group] = low | high << 2
                stored = [low, high]
            for slot, place in enumerate(stored):
                if place in kept and (slot == 0 or place != stored[0]):
                    values[row, group * size // 2 + slot] = weight[row, own[place]]
    return values, nibbles
