"""The pattern that zeros have."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile.zeros import mask_of, pattern_of
from secateur.pattern import Pattern
from tests.compile.conftest import PATTERNS, brute_mask


def weights(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.Generator().manual_seed(1)
    sign = torch.randn(mask.shape, generator=made).sign()
    return (sign * (1 + torch.rand(mask.shape, generator=made)) * mask).to(dtype)


@pytest.mark.parametrize("text", [*PATTERNS, "8:16", "2:8", "90%@16x1", "30%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_each_pattern_is_found(text: str, dtype: torch.dtype) -> None:
    mask = brute_mask(64, 128, Pattern.parse(text))
    weight = weights(mask.float(), dtype)
    found = pattern_of(weight)
    if "%" in text:
        assert found.rows == Pattern.parse(text).rows
        assert not found.is_nm
    else:
        assert str(found) == text
    assert torch.equal(mask_of(weight, found), mask)
    found.check(mask)


@given(
    rows=st.sampled_from([1, 3, 8, 16, 32]),
    columns=st.integers(1, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_zeros_have_a_pattern_whose_mask_keeps_the_rest(
    rows: int, columns: int, share: float, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=made)
    weight *= torch.rand(rows, columns, generator=made) >= share
    pattern = pattern_of(weight)
    mask = mask_of(weight, pattern)
    assert not ((weight != 0) & ~mask).any()
    assert Pattern.parse(str(pattern)) == pattern
    pattern.check(mask)


def test_a_kept_weight_may_be_zero() -> None:
    mask = brute_mask(32, 64, Pattern.parse("2:4"))
    weight = weights(mask.float())
    weight[3, :8] = 0
    weight[weight.abs() < 1.1] = -0.0  # a tenth of the kept ones
    pattern = pattern_of(weight)
    assert str(pattern) == "2:4"
    kept = mask_of(weight, pattern)
    assert torch.equal(kept[3, :8], torch.tensor([True, True, False, False] * 2))


def test_few_zeros_are_no_pattern() -> None:
    weight = weights(torch.ones(32, 64))
    weight.view(-1)[:400] = 0
    assert pattern_of(weight).is_dense
    assert mask_of(weight, Pattern()).all()


def test_all_zeros() -> None:
    for rows, columns in ((16, 64), (3, 5)):
        weight = torch.zeros(rows, columns)
        pattern = pattern_of(weight)
        assert pattern.removed >= Fraction(99, 100)
        assert not mask_of(weight, pattern).any()
        pattern.check(mask_of(weight, pattern))
