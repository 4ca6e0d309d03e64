"""Bitmasks and kept values: the two halves of a packed matrix, and the way back.

A matrix ``[rows, columns]`` with a keep-mask becomes its *bits* (uint8, bit i of byte j = column
8j + i, one row of bits for every ``height`` rows that share it) and its *values* (the kept
elements, row by row, in column order). `secateur.bits` makes the bits; here are the values. They
move through integer views only: copying floats may quieten NaNs in some of torch's kernels,
copying integers cannot.
"""

from __future__ import annotations

import numpy as np
import torch

_CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def nonzero(weight: torch.Tensor) -> torch.Tensor:
    """Where a tensor of any type is not zero, bool of its shape; -0 is zero."""
    if weight.element_size() == 1 and weight.is_floating_point():  # torch compares no fp8
        return (weight.view(torch.uint8) & 127) != 0
    return weight != 0


def count_kept(mask: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many positions each row of a mask keeps, ``[rows]``."""
    counts: np.ndarray[tuple[int], np.dtype[np.int64]]
    counts = np.count_nonzero(mask.cpu().numpy(), axis=1)
    return counts


def pack_values(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Take the kept elements of a matrix, to the bit.

    Args:
        weight: ``[rows, columns]`` of any type.
        mask: bool ``[rows, columns]``, True = kept.

    Returns:
        ``[rows, k]`` if every row keeps k elements, else ``[kept]``; of weight's type.
    """
    carrier = weight.contiguous().view(_CARRIER[weight.element_size()])
    values = carrier[mask].view(weight.dtype)
    counts = count_kept(mask)
    return values.reshape(len(mask), counts[0]) if (counts == counts[0]).all() else values


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """Two values of -8 to 7 a byte, the first of each pair in the low half.

    Args:
        values: int8, ``[count]``.

    Returns:
        uint8 ``[ceil(count / 2)]``, two's complement; an unused last half is 0.
    """
    pairs = torch.zeros(-(-len(values) // 2) * 2, dtype=torch.uint8, device=values.device)
    pairs[: len(values)] = values.view(torch.uint8) & 15
    return pairs[::2] | (pairs[1::2] << 4)


def expand(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The matrix ``[rows, columns]`` whose kept elements are ``values``, the others +0.0.

    Raises:
        ValueError: there are not as many values as kept positions.
    """
    kept = int(count_kept(mask).sum())
    if values.numel() != kept:
        raise ValueError(f"{values.numel()} values for {kept} kept positions")
    carrier = values.contiguous().view(_CARRIER[values.element_size()]).reshape(-1)
    dense = torch.zeros(mask.shape, dtype=carrier.dtype, device=mask.device)
    return dense.masked_scatter_(mask, carrier).view(values.dtype)
