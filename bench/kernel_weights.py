"""Random weights for measuring kernels: masks of a pattern, values of a type, and what is right.

What a kernel multiplies does not change its speed, only where the kept weights lie and how many
bytes they take; so the values are drawn, and the masks too, uniformly among those of a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Literal

import numpy as np
import torch

from secateur.pattern import Pattern

ValueType = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp8"]
Array = np.ndarray[Any, Any]

LIMITS = {"int8": 127, "int4": 7}
_LARGEST_TABLE = 20_000  # masks of a group of N:M that are listed, not drawn one by one
_SIGMA = 0.02  # of the weights, as in a language model


def random_mask(pattern: Pattern, rows: int, columns: int, draw: np.random.Generator) -> Array:
    """A keep-mask of a pattern, one row for each block row.

    Args:
        pattern: one that fits the shape (`Pattern.obstacle`).
        rows, columns: of the weight.
        draw: where chance comes from.

    Returns:
        bool ``[rows / pattern.rows, columns]``. Of ``P%`` exactly `Pattern.removed_of` all
        positions are removed, of ``N:M`` exactly M - N of every M.
    """
    height = rows // pattern.rows
    if pattern.is_dense:
        return np.ones((height, columns), dtype=np.bool_)
    if pattern.is_nm:
        groups = height * columns // pattern.m
        return _random_groups(pattern.n, pattern.m, groups, draw).reshape(height, columns)
    positions = height * columns
    mask = draw.random(positions, dtype=np.float32) >= float(pattern.removed)
    surplus = int(np.count_nonzero(mask)) - (positions - pattern.removed_of(positions))
    if surplus:
        candidates = np.flatnonzero(mask if surplus > 0 else ~mask)
        mask[draw.choice(candidates, abs(surplus), replace=False, shuffle=False)] = surplus < 0
    return mask.reshape(height, columns)


def _random_groups(n: int, m: int, groups: int, draw: np.random.Generator) -> Array:
    """Bool ``[groups, m]`` with n kept in each."""
    if comb(m, n) > _LARGEST_TABLE:
        chosen = draw.random((groups, m), dtype=np.float32).argsort(axis=1)[:, :n]
        mask = np.zeros((groups, m), dtype=np.bool_)
        np.put_along_axis(mask, chosen, True, axis=1)
        return mask
    kept = list(combinations(range(m), n))
    table = np.zeros((len(kept), m), dtype=np.bool_)
    np.put_along_axis(table, np.array(kept), True, axis=1)
    return table[draw.integers(len(table), size=groups, dtype=np.uint16)]


@dataclass(frozen=True)
class Weights:
    """A random dense weight of one value type.

    Attributes:
        kind: the value type.
        stored: ``[rows, columns]``: float32, uint16 (the bits of bf16 or fp16), uint8 (those of
            fp8) or int8 (of int4 -7 … 7, one in a byte).
        scales: float16 ``[rows, ceil(columns / group_size)]`` of int8 and int4; float32
            ``[rows, 1]`` of fp8.
        group_size: columns that share a scale, of integers; else None.
    """

    kind: ValueType
    stored: Array
    scales: Array | None
    group_size: int | None = None

    @classmethod
    def draw(
        cls, kind: ValueType, rows: int, columns: int, group_size: int, draw: np.random.Generator
    ) -> Weights:
        """Gaussian floats (also fp8), or uniform integers with random positive scales."""
        if kind in LIMITS:
            limit = LIMITS[kind]
            stored = draw.integers(-limit, limit + 1, (rows, columns), dtype=np.int8)
            scales = draw.uniform(0.5, 1.5, (rows, -(-columns // group_size)))
            return cls(kind, stored, (scales * 2 * _SIGMA / limit).astype(np.float16), group_size)
        weight = draw.standard_normal((rows, columns), dtype=np.float32)
        weight *= _SIGMA
        if kind == "bf16":
            bits = torch.from_numpy(weight).to(torch.bfloat16).view(torch.uint16).numpy()
            return cls(kind, bits, None)
        if kind == "fp16":
            return cls(kind, weight.astype(np.float16).view(np.uint16), None)
        if kind == "fp8":
            scales = np.ldexp(np.float32(1), draw.integers(-13, -10, (rows, 1)))
            numbers = torch.from_numpy(weight / scales).clamp_(-448, 448)
            return cls(kind, numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scales)
        return cls(kind, weight, None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.stored.shape
        return rows, columns

    def kept(self, mask: Array | None) -> Array:
        """The kept values row by row, as a packed model has them: int4 two in a byte, low first."""
        values = self.stored.reshape(-1) if mask is None else self.stored[mask]
        if self.kind != "int4":
            return values
        nibbles = values.view(np.uint8) & 0xF
        if len(nibbles) % 2:
            nibbles = np.append(nibbles, np.uint8(0))
        packed: Array = nibbles[0::2] | nibbles[1::2] << 4
        return packed

    def dense(self, mask: Array | None = None) -> Array:
        """float32 ``[rows, columns]``: what the weight is worth, 0 where the mask removes it."""
        if self.kind == "fp8":
            weight = torch.from_numpy(self.stored).view(torch.float8_e4m3fn).float().numpy()
            weight *= self.scales
        elif self.scales is not None:
            scales = self.scales.astype(np.float32).repeat(self.group_size or 1, axis=1)
            weight = self.stored * scales[:, : self.stored.shape[1]]
        elif self.kind == "bf16":
            weight = torch.from_numpy(self.stored).view(torch.bfloat16).float().numpy()
        elif self.kind == "fp16":
            weight = self.stored.view(np.float16).astype(np.float32)
        else:
            weight = self.stored.copy()
        if mask is not None:
            weight *= mask
        return weight


def relative_error(result: Array, truth: Array) -> float:
    """‖result - truth‖ / ‖truth‖, infinite where the result is not finite."""
    if not np.isfinite(result).all():
        return float("inf")
    return float(np.linalg.norm(result - truth) / np.linalg.norm(truth))
