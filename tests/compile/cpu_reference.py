"""Random packed weights for the CPU kernels, and what their products should be, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.compile import cpu
from secateur.pattern import Pattern

Array = np.ndarray[Any, Any]

TYPES: list[cpu.Values] = ["fp32", "bf16", "fp16", "int8", "int4"]
FEW = 8  # tokens up to which AVX-512 keeps what is left over apart


@dataclass(frozen=True)
class Weight:
    """A packed weight as docs/format.md describes it, and the dense float32 that it stands for."""

    values: Array
    bitmask: Array | None
    shape: tuple[int, int]
    pattern: Pattern
    value_type: cpu.Values
    scales: Array | None
    group_size: int | None
    mask: Array
    dense: Array

    def pack(self, **choices: Any) -> cpu.CpuMatrix:
        return cpu.pack(
            self.values,
            self.bitmask,
            self.shape,
            self.pattern,
            self.value_type,
            scales=self.scales,
            group_size=self.group_size,
            **choices,
        )


def draw_mask(rng: np.random.Generator, shape: tuple[int, int], pattern: Pattern) -> Array:
    """A random mask of the pattern; of P% the count is as chance has it."""
    blocks, columns = shape[0] // pattern.rows, shape[1]
    if pattern.is_dense:
        return np.ones(shape, bool)
    if pattern.is_nm:
        order = rng.random((blocks, columns // pattern.m, pattern.m)).argsort(-1).argsort(-1)
        kept = (order < pattern.n).reshape(blocks, columns)
    else:
        kept = rng.random((blocks, columns)) >= float(pattern.removed)
    return np.repeat(kept, pattern.rows, axis=0)


def make_weight(
    rng: np.random.Generator,
    shape: tuple[int, int],
    pattern: str,
    value_type: cpu.Values,
    group_size: int = 64,
    mask: Array | None = None,
) -> Weight:
    """A Gaussian weight, or uniform integers with scales of several magnitudes."""
    chosen = Pattern.parse(pattern)
    kept = draw_mask(rng, shape, chosen) if mask is None else mask
    scales = None
    if value_type in ("int8", "int4"):
        limit = 127 if value_type == "int8" else 7
        integers = rng.integers(-limit, limit + 1, shape).astype(np.int8)
        groups = -(-shape[1] // group_size)
        scales = np.exp(rng.normal(-5, 1, (shape[0], groups))).astype(np.float16)
        whole = integers * np.repeat(scales.astype(np.float32), group_size, axis=1)[:, : shape[1]]
        values = integers[kept]
        if value_type == "int4":
            nibbles = np.append(values, np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
            values = nibbles[0::2] | nibbles[1::2] << 4
    else:
        whole = rng.standard_normal(shape).astype(np.float32)
        stored = whole
        if value_type == "fp16":
            stored = whole.astype(np.float16).view(np.uint16)
            whole = stored.view(np.float16).astype(np.float32)
        elif value_type == "bf16":
            stored = (whole.view(np.uint32) >> 16).astype(np.uint16)
            whole = (stored.astype(np.uint32) << 16).view(np.float32)
        values = stored[kept]
    return Weight(
        values,
        None if chosen.is_dense else np.packbits(kept[:: chosen.rows], axis=1, bitorder="little"),
        shape,
        chosen,
        value_type,
        scales,
        None if scales is None else group_size,
        kept,
        np.where(kept, whole, np.float32(0)),
    )


def quantised(x: Array, group: int) -> Array:
    """Activations as the kernels quantise them, in float64: the definition.

    Of each token and ``group`` columns the largest magnitude becomes 127; the others are rounded
    to whole numbers, ties to even. Below 2^-100 a group is 0.
    """
    tokens, columns = x.shape
    groups = np.zeros((tokens, -(-columns // group), group), np.float32)
    groups.reshape(tokens, -1)[:, :columns] = x
    peak = np.abs(groups).max(axis=2, keepdims=True)
    tiny = peak < np.float32(2.0**-100)
    factor = np.where(tiny, np.float32(0), np.float32(127) / np.where(tiny, np.float32(1), peak))
    whole = np.rint(groups * factor).astype(np.float64)
    return (whole * (peak / np.float32(127))).reshape(tokens, -1)[:, :columns]


def left_over(mask: Array) -> Array:
    """What the layout 4:16+rest holds apart: all but the first 4 kept of every 16 columns."""
    rows, columns = mask.shape
    windows = np.zeros((rows, -(-columns // 16), 16), bool)
    windows.reshape(rows, -1)[:, :columns] = mask
    later = windows & (windows.cumsum(axis=2) > 4)
    return later.reshape(rows, -1)[:, :columns]


def decoded(weight: Weight, layout: str) -> Array:
    """The dense weight as the layout holds it: what is left over is rounded to fp16."""
    if layout != "4:16+rest":
        return weight.dense
    rounded = weight.dense.astype(np.float16).astype(np.float32)
    return np.where(left_over(weight.mask), rounded, weight.dense)


def product(weight: Weight, matrix: cpu.CpuMatrix, x: Array) -> tuple[Array, float]:
    """``x Wᵀ`` in float64, and what its norm would be if no terms cancelled.

    With AVX-512 and many tokens what is left over becomes the integers again that it was.
    """
    rounded = matrix.rounds_inputs(len(x))
    whole = rounded and cpu.isa() == "avx512" and len(x) > FEW
    held = (weight.dense if whole else decoded(weight, matrix.layout)).astype(np.float64)
    size = float(np.sqrt((held**2 @ (x.astype(np.float64) ** 2).T).sum()))
    exact = x.astype(np.float64)
    if not rounded:
        return exact @ held.T, size
    apart = matrix.layout == "4:16+rest" and not whole
    rest = left_over(weight.mask) if apart else np.zeros(weight.shape, bool)
    rough = quantised(x, min(weight.group_size or 64, 64))
    return rough @ np.where(rest, 0, held).T + exact @ np.where(rest, held, 0).T, size


def error(y: Array, weight: Weight, matrix: cpu.CpuMatrix, x: Array) -> float:
    """How far ``y`` is from the product, relative to its norm."""
    wanted, size = product(weight, matrix, x)
    return float(np.linalg.norm(y - wanted)) / max(size, 1e-30)


@contextmanager
def restored() -> Iterator[None]:
    """The instruction set and the threads as they were, afterwards."""
    name, count = cpu.isa(), cpu.threads()
    try:
        yield
    finally:
        cpu.use_isa(name)
        if cpu.threads() != count:
            cpu.set_threads(count)
