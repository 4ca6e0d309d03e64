"""What the linears behind removed heads and channels do to make up for them.

    y = W x with the inputs P gone and K kept; X: calibration inputs of the original block

    lsq     minimise ‖W X - Ŵ X_K‖² + λ‖Ŵ - W_K‖² over Ŵ:
            Ŵ = W_K + W_P G_PK (G_KK + λI)⁻¹,   G = X Xᵀ, λ = damping mean(diag G)
    bias    b += W_P mean(x_P): An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for
            Large Language Models", eq. 7

The inputs are those that the block gets from the smaller blocks before it.
"""

from __future__ import annotations

from typing import Literal

import torch

from secateur.gram import damped

Compensation = Literal["lsq", "bias"]
COMPENSATIONS: dict[str, str] = {
    "lsq": "least squares: o_proj and down_proj make up for the inputs that are gone",
    "bias": "a bias of o_proj and down_proj makes up for the mean of the inputs that are gone",
}
_DAMPING = 0.01


def refitted(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float = _DAMPING
) -> torch.Tensor:
    """Ŵ, the best weights for the kept inputs.

    Args:
        weight: W, ``[out, in]``.
        gram: G, ``[in, in]``.
        kept: K, numbers of inputs.

    Returns:
        ``[out, kept]`` fp32.
    """
    weight, gram = weight.float(), damped(gram, damping)
    gone = torch.ones(len(gram), dtype=torch.bool)
    gone[kept] = False
    missing = weight[:, gone] @ gram[gone][:, kept]
    factor, _ = torch.linalg.cholesky_ex(gram[kept][:, kept].double())
    change = torch.cholesky_solve(missing.double().t(), factor).t()
    return weight[:, kept] + change.float()


def bias_of_removed(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What the removed inputs put out on average, ``[out]`` fp32.

    Args:
        weight: ``[out, in]``.
        mean: of the inputs, ``[in]``.
        kept: numbers of inputs.
    """
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[kept] = False
    return weight[:, gone].float() @ mean[gone]
