"""What solvers compute from the Gram matrix G = Σ x xᵀ of a layer's inputs."""

from __future__ import annotations

import torch

from secateur.errors import ModelError

_MOST_RETRIES = 8


def row_errors(change: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """‖d X‖² of each row d of ``change`` [out, in], in fp64: [out]."""
    return ((change @ gram) * change).sum(dim=1, dtype=torch.float64)


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """G + λI with λ = ``damping`` times the mean of G's diagonal; a new matrix.

    A dead input, one that was always 0, counts with the mean of the others, so that it can be
    divided by; it is correlated with nothing, so no other weight notices.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else gram.new_ones(())
    if not mean.isfinite():
        raise ModelError(
            "the inputs of a layer are so large that their squares overflow, or are NaN",
            "check the model's perplexity; use --device cpu for fp32 activations",
        )
    result = gram.clone()
    result.diagonal().copy_(diagonal.where(alive, mean) + damping * mean)
    return result


def inverse_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, int]:
    """Upper triangular U with UᵀU = (G + λI)⁻¹, λ as in `damped`.

    Where the factorisation fails (few tokens, nearly equal inputs, rounding), λ is raised tenfold
    until it does not.

    Returns:
        U [in, in] fp32, and how many times λ was raised.
    """
    for retry in range(_MOST_RETRIES):
        # With J the reversal of the order, JHJ = LLᵀ gives H = RRᵀ for the upper R = JLJ.
        # One name for all of them: no more than three such matrices exist at any time.
        matrix = damped(gram, max(damping, 1e-6 if retry else 0.0) * 10**retry)
        matrix = matrix.flip(0, 1)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            continue
        matrix = matrix.flip(0, 1)
        identity = torch.eye(len(matrix), device=matrix.device)
        upper = torch.linalg.solve_triangular(matrix, identity, upper=True)
        if upper.isfinite().all():
            return upper, retry
    raise ModelError(
        "the inputs of a layer hold NaN or infinite values",
        "check the model's perplexity; use --device cpu for fp32 activations",
    )
