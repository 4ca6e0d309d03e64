"""Products of fp8 weights with inputs that are rounded to fp8, by torch's kernels.

    y [tokens, rows] = (x8 @ w8.T) * scale of the token * scale of the row + bias

Each token's inputs have a scale (`secateur.compile.quantize.round_tokens`), as in vLLM. The sums
are fp32.
"""

from __future__ import annotations

import torch

from secateur.compile import quantize
from secateur.compile.gpu import cusparselt


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`secateur.compile.quantize.round_tokens`; on a GPU by a kernel of our own."""
    if not x.is_cuda:
        return quantize.round_tokens(x)
    from secateur.compile.gpu import triton_product

    return triton_product.round_tokens(x.contiguous())


def sparse_product(
    compressed: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """By cuSPARSELt, which knows no scales of tokens: it gives fp32, and torch does the rest.

    Args:
        compressed: of `cusparselt.compress`.
        x: ``[tokens, columns]``.
        scales: fp32 ``[rows]``.
        bias: ``[rows]`` of x's type.

    Returns:
        ``[tokens, rows]`` of x's type, rounded once.
    """
    values, own = round_tokens(x)
    y = cusparselt.product(compressed, values, out_dtype=torch.float32) * scales * own
    return (y if bias is None else y + bias).to(x.dtype)


def scaled_product(
    weight: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """By ``torch._scaled_mm`` on a dense weight.

    Args:
        weight: float8_e4m3fn ``[rows, columns]``, both multiples of 16.
        x: bf16 ``[tokens, columns]``: with scales of rows there is no other result.
        scales: fp32 ``[rows]``.
        bias: bf16 ``[rows]``.
    """
    values, own = round_tokens(x)
    return torch._scaled_mm(
        values, weight.t(), own, scales[None, :].contiguous(), bias=bias, out_dtype=x.dtype
    )
