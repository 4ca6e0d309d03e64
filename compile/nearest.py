"""The types that weights are multiplied in, found as they are loaded, without torch.

`round_to_nearest` makes the numbers of `secateur.compile.quantize.rtn`, which is the one to read.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from secateur.compile import e4m3
from secateur.errors import ModelError

Array = np.ndarray[Any, Any]
FloatType = Literal["fp32", "bf16", "fp16"]

_ROWS = 64  # at a time: what is computed between stays in the cache


def round_to_nearest(weight: Array, limit: int, group_size: int) -> tuple[Array, Array]:
    """Round every weight to nearest, ties to even.

    Args:
        weight: float32 ``[rows, columns]``.
        limit: the largest integer.
        group_size: columns that share a scale.

    Returns:
        int8 ``[rows, columns]`` and float16 ``[rows, ceil(columns / group_size)]``.

    Raises:
        ModelError: a weight is too large.
    """
    rows, columns = weight.shape
    count = -(-columns // group_size)
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, count), np.float16)
    for top in range(0, rows, _ROWS):
        own = weight[top : top + _ROWS]
        if columns % group_size:
            own = np.pad(own, ((0, 0), (0, -columns % group_size)))
        groups = own.reshape(len(own), count, group_size)
        scale = _scale_above(np.abs(groups).max(axis=2), limit)
        wide = scale.astype(np.float32)[:, :, None]
        whole = np.divide(groups, wide, out=np.zeros_like(groups), where=wide > 0)
        np.clip(np.rint(whole, out=whole), -limit, limit, out=whole)
        values[top : top + _ROWS] = whole.reshape(len(own), -1)[:, :columns]
        scales[top : top + _ROWS] = scale
    return values, scales


def pack_nibbles(values: Array) -> Array:
    """int8 ``[count]`` of -8 to 7, two a byte; see `secateur.compile.bitmask.pack_nibbles`."""
    even = np.append(values, np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
    packed: Array = even[0::2] | even[1::2] << 4
    return packed


def narrowest(values: Array) -> tuple[Array, FloatType]:
    """fp32 values as bits of bf16 or fp16, if all of them are such numbers; else as they are."""
    flat = values.reshape(-1)
    if not any((some.view(np.uint32) & 0xFFFF).any() for some in (flat[:4096], flat)):
        return (values.view(np.uint32) >> 16).astype(np.uint16), "bf16"
    with np.errstate(over="ignore"):
        for some in (flat[:4096], flat):  # the first few say no almost always
            half = some.astype(np.float16)
            if not np.array_equal(half.astype(np.float32).view(np.uint32), some.view(np.uint32)):
                return values, "fp32"
    return half.reshape(values.shape).view(np.uint16), "fp16"


def widen_fp8(values: Array, counts: Array, scales: Array) -> tuple[Array, FloatType, str]:
    """fp8 values times the scales of their rows, in the narrowest type of floats that serves.

    Args:
        values, counts, scales: as of `e4m3.row_products`.

    Returns:
        The products ``[kept]`` as `narrowest` gives them, if bf16 or fp16 holds all of them, as of
        the scales that `secateur compile` chooses; else rounded to fp16 unless that costs more than
        its usual 2^-11 (of the norm); else in fp32. Their type, and in words what was done.
    """
    products = e4m3.row_products(values, counts, scales)
    found, kind = narrowest(products)
    if kind != "fp32":
        return found, kind, "fp8 values times the scales of their rows, exactly"
    with np.errstate(over="ignore", invalid="ignore"):
        half, peak = products.astype(np.float16), np.abs(products).max()
        lost = np.linalg.norm((half.astype(np.float32) - products) / peak)
        if lost <= 2**-11 * np.linalg.norm(products / peak):
            found, kind = half.view(np.uint16), "fp16"
    return found, kind, f"fp8 values times the scales of their rows, rounded once, to {kind}"


def _scale_above(largest: Array, limit: int) -> Array:
    """The smallest fp16 numbers s with s · limit ≥ ``largest``."""
    with np.errstate(over="ignore"):
        scale = (largest / np.float32(limit)).astype(np.float16)
    low = scale.astype(np.float32) * np.float32(limit) < largest
    scale = np.where(low, (scale.view(np.int16) + np.int16(1)).view(np.float16), scale)
    if not np.isfinite(scale).all():
        raise ModelError(
            f"a weight of {float(largest.max()):g} is too large for scales in fp16",
            "use values bf16, which has the range of fp32",
        )
    return scale
