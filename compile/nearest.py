"""Rounding dense weights to integers with group scales as they are loaded, without torch.

The same numbers as `secateur.compile.quantize.rtn`, which is the one to read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.errors import ModelError

Array = np.ndarray[Any, Any]

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
