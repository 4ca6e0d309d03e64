"""Random packed linears with their weights, and how far a product may be off."""

from __future__ import annotations

from typing import Any

import torch

from secateur.compile.config import BITMASK, LIMITS, SCALES, VALUES
from secateur.compile.packed import decode, encode, encode_integers, pieces
from secateur.compile.quantize import rtn
from secateur.compile.stored import Pieces
from secateur.compile.values import DTYPES
from secateur.pattern import Pattern
from tests.compile.conftest import brute_mask

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pack(
    weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern, values: Any, group_size: int = 32
) -> tuple[Pieces, torch.Tensor]:
    """A packed linear, and its dense weight in fp32, exactly."""
    if values in LIMITS:
        size = None if values == "fp8" else group_size
        quantised = rtn(weight, mask, LIMITS[values], size or weight.shape[1])
        layer, tensors = encode_integers(quantised, mask, pattern, values)
        own = (tensors.get(BITMASK), tensors[VALUES], tensors[SCALES], size)
    else:
        layer, bits, kept = encode(weight.to(DTYPES[values]), mask, pattern)
        own = (None if pattern.is_dense else bits, kept, None, None)
    return pieces("layer", layer, *own), decode("layer", layer, *own).float()


def draw(
    pattern: str, values: Any, rows: int, columns: int, group_size: int = 32, seed: int = 0
) -> tuple[Pieces, torch.Tensor]:
    """A random linear of a pattern; see `pack`."""
    torch.manual_seed(seed)
    chosen = Pattern.parse(pattern)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if not chosen.is_dense:
        mask = brute_mask(rows, columns, chosen, seed)
    return pack(torch.randn(rows, columns), mask, chosen, values, group_size)


def assert_product(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y is x @ weight.T + bias, up to fp32 sums and one rounding to y's type.

    Triton's interpreter rounds to bf16 towards zero: one unit in the last place, not half.
    """
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[y.dtype]
    limit = unit * exact.abs() + 2**-20 * size + 2**-24
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= limit).all())
