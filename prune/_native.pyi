"""Native loops of secateur.prune (C++17, no torch)."""

import torch

def swap(
    gram: torch.Tensor,
    target: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    slope: torch.Tensor,
    least: torch.Tensor,
    made: torch.Tensor,
    m: int,
    candidates: int,
    limit: int,
    threads: int,
) -> None:
    """The exchanges of swaps.py; value, kept, slope and made are changed in place."""

def compensate(
    weight: torch.Tensor,
    kept: torch.Tensor,
    error: torch.Tensor,
    factor: torch.Tensor,
    n: int,
    m: int,
    height: int,
    threads: int,
) -> None:
    """A block of columns of sparsegpt.py; weight, kept and error are changed in place."""
