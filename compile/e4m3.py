"""The 8-bit floats e4m3fn ("fp8") as bytes, without torch.

A byte is a sign, four bits of exponent with a bias of 7 and three of mantissa. There is no
infinity; 0x7F and 0xFF are NaN; the largest number is 448, the smallest positive one 2^-9. Source:
Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; the bytes are those of torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Floats = np.ndarray[Any, np.dtype[np.float32]]

LARGEST = 448.0
LARGEST_SCALE = 2.0**119
"""The largest power of two whose product with 448 fp32 holds."""


def _numbers() -> Floats:
    """The number of every byte, float32 ``[256]``."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), mantissa / 512)
    magnitude[[0x7F, 0xFF]] = np.nan
    return np.copysign(magnitude, np.where(byte < 128, 1.0, -1.0)).astype(np.float32)


NUMBERS = _numbers()


def is_nan(values: Array) -> Array:
    """Which bytes are NaN, bool of their shape."""
    found: Array = (values & 0x7F) == 0x7F
    return found


def row_products(values: Array, counts: Array, scales: Array) -> Floats:
    """Kept values times the scales of their rows, float32 ``[kept]``, each rounded once.

    Args:
        values: uint8 ``[kept]``, row by row.
        counts: how many of them each row has, ``[rows]``.
        scales: float32 ``[rows, 1]``.
    """
    products: Floats = NUMBERS[values] * np.repeat(scales.reshape(-1), counts)
    return products
