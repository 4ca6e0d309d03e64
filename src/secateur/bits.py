"""Masks as bits: uint8 ``[rows, ceil(columns / 8)]``, bit i of byte j is column 8j + i, 1 = kept.

The order is that of ``numpy.packbits(..., bitorder="little")``; bits past the last column are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Boolean ``[rows, columns]`` on the CPU to bits."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def unpack_mask(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Bits to boolean ``[rows, columns]``.

    Raises:
        ValueError: wrong type or width, or a bit is set past the last column.
    """
    import numpy as np
    import torch

    width = -(-columns // 8)
    if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != width:
        raise ValueError(
            f"a bitmask of {columns} columns is uint8 [rows, {width}], "
            f"not {bits.dtype} {list(bits.shape)}"
        )
    mask = np.unpackbits(bits.numpy(), axis=1, bitorder="little").astype(bool)
    if mask[:, columns:].any():
        raise ValueError(f"a bit past the last column ({columns}) is set")
    return torch.from_numpy(mask[:, :columns])
