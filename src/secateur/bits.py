"""Masks as bits: the form they have on disk, in pruned and packed models alike.

uint8 ``[rows / height, ceil(columns / 8)]``; bit i of byte j is column 8j + i, 1 = kept (the order
of ``numpy.packbits(..., bitorder="little")``); bits past the last column are 0. ``height`` rows
that share a mask share a row of bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import torch


def pack_mask(mask: torch.Tensor, height: int = 1) -> torch.Tensor:
    """Pack a keep-mask into bits.

    Args:
        mask: bool ``[rows, columns]``, True = kept; equal within blocks of ``height`` rows.
        height: how many consecutive rows share one row of bits; divides ``rows``.

    Returns:
        uint8 ``[rows / height, ceil(columns / 8)]``; the bits past the last column are zero.
    """
    import numpy as np
    import torch

    bits = np.packbits(mask[::height].cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits)


def unpack_mask(bits: torch.Tensor, columns: int, height: int = 1) -> torch.Tensor:
    """The keep-mask, bool ``[rows, columns]`` on the CPU, of bits made by `pack_mask`.

    Raises:
        ValueError: the bits have another type or shape, or a bit past the last column is set.
    """
    import torch

    return torch.from_numpy(unpack_bits(bits.cpu().numpy(), columns, height))


def unpack_bits(
    bits: np.ndarray[Any, Any], columns: int, height: int = 1
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`unpack_mask` without torch."""
    import numpy as np

    if bits.dtype != np.uint8 or bits.ndim != 2:
        raise ValueError(f"bits are a uint8 matrix, not {bits.dtype} of {bits.ndim} axes")
    if bits.shape[1] != (columns + 7) // 8:
        raise ValueError(f"{columns} columns take {(columns + 7) // 8} bytes, not {bits.shape[1]}")
    if columns % 8 and (stray := bits[:, -1] >> (columns % 8) != 0).any():
        row = int(stray.argmax())
        raise ValueError(f"row {row} has bits set past the last column ({columns - 1})")
    mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(np.bool_)
    return np.repeat(mask, height, axis=0) if height > 1 else mask
