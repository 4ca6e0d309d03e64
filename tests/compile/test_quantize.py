"""Rounding, GPTQ and nibbles against plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compile.bitmask import pack_nibbles
from secateur.compile.quantize import activation_error, gptq, rtn, scale_above, scaled
from secateur.compile.stored import unpack_nibbles
from secateur.errors import ModelError
from secateur.gram import damped
from secateur.pattern import Pattern
from tests.compile.conftest import brute_mask

LIMITS = [127, 7]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose time to more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def correlated(rows: int, columns: int, seed: int, tokens: int = 400) -> tuple[torch.Tensor, ...]:
    """A weight, and inputs whose channels are mixed and of different size."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=made) / columns**0.5 + torch.eye(columns)
    size = torch.exp(torch.randn(columns, generator=made))
    inputs = torch.randn(tokens, columns, generator=made) @ mix * size
    return torch.randn(rows, columns, generator=made), inputs


def output_error(weight: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - other).t()).square().sum())


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("columns", "size"), [(64, 32), (75, 32), (20, 64), (130, 128)])
def test_rtn_is_what_a_loop_makes(limit: int, columns: int, size: int) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    mask = brute_mask(5, columns, Pattern.parse("50%"))
    mask[0, :size] = False  # a group without a weight
    found = rtn(weight, mask, limit, size)
    assert found.values.dtype == torch.int8
    assert found.scales.dtype == torch.float16
    assert found.scales.shape == (5, math.ceil(columns / size))
    for row in range(5):
        for group in range(found.scales.shape[1]):
            places = range(group * size, min((group + 1) * size, columns))
            kept = [i for i in places if mask[row, i]]
            largest = max((abs(float(weight[row, i])) for i in kept), default=0.0)
            scale = np.float16(largest / limit)
            while float(scale) * limit < largest:
                scale = np.nextafter(scale, np.float16(np.inf))
            assert float(found.scales[row, group]) == float(scale)
            for i in places:
                value = round(float(weight[row, i]) / float(scale)) if i in kept else 0
                assert int(found.values[row, i]) == value
                assert abs(value) <= limit
                step = float(found.dense()[row, i])
                assert step == value * float(scale)  # fp32 holds the product exactly
    assert found.scales[0, 0] == 0


@settings(max_examples=300, deadline=None)
@given(largest=st.floats(0, 200_000, width=32), limit=st.sampled_from(LIMITS))
def test_scales_are_rounded_up_and_no_further(largest: float, limit: int) -> None:
    given_ = torch.tensor([largest])
    if largest > 65504 * limit:
        with pytest.raises(ModelError, match="too large for scales in fp16"):
            scale_above(given_, limit)
        return
    scale = scale_above(given_, limit)
    assert float(scale) * limit >= largest  # nothing clips
    below = np.nextafter(scale.numpy(), np.float16(-np.inf))
    assert float(below[0]) * limit < largest or float(scale) == 0


def eliminate(
    weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, limit: int, size: int
) -> tuple[list[list[int]], list[list[float]]]:
    """GPTQ as in the paper's section 3: one weight of one row after the other, and after each the
    inverse of H without its column, by Gaussian elimination (no Cholesky factor), in fp64.
    """
    inverse = torch.linalg.inv(damped(gram, 0.01).double()).numpy()
    rows, columns = weight.shape
    values = [[0] * columns for _ in range(rows)]
    scales: list[list[float]] = [[] for _ in range(rows)]
    left, kept = (weight.double() * mask).tolist(), mask.tolist()
    for j in range(columns):
        for row in range(rows):
            if j % size == 0:
                group = [k for k in range(j, min(j + size, columns)) if kept[row][k]]
                largest = torch.tensor([max((abs(left[row][k]) for k in group), default=0.0)])
                scales[row].append(float(scale_above(largest, limit)))
            if not kept[row][j]:
                continue
            scale = scales[row][-1]
            value = round(left[row][j] / scale) if scale else 0
            values[row][j] = max(-limit, min(limit, value))
            error = (left[row][j] - values[row][j] * scale) / inverse[j, j]
            for k in range(j + 1, columns):
                if kept[row][k]:
                    left[row][k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values, scales


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("columns", "size", "pattern"), [(40, 32, "2:4"), (48, 32, "dense"), (140, 64, "50%")]
)
def test_gptq_is_the_papers_elimination(limit: int, columns: int, size: int, pattern: str) -> None:
    weight, inputs = correlated(3, columns, seed=columns)
    inputs[:, 5] = 0  # a dead input
    chosen = Pattern.parse(pattern)
    mask = torch.ones(3, columns, dtype=torch.bool)
    if not chosen.is_dense:
        mask = brute_mask(3, columns, chosen)
    gram = inputs.t() @ inputs
    values, scales = eliminate(weight, mask, gram, limit, size)
    found = gptq(weight, mask, gram, limit, size, shrink=(1.0,))
    assert torch.equal(found.values, torch.tensor(values, dtype=torch.int8))
    torch.testing.assert_close(
        found.scales.double(), torch.tensor(scales).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", ["2:4", "50%", "50%@8x1"])
def test_gptq_errs_less_than_rtn_and_keeps_zeros(limit: int, seed: int, pattern: str) -> None:
    weight, inputs = correlated(64, 160, seed)
    mask = brute_mask(64, 160, Pattern.parse(pattern), seed)
    weight = weight * mask
    found = gptq(weight, mask, inputs.t() @ inputs, limit, 64)
    nearest = rtn(weight, mask, limit, 64)
    assert output_error(weight, found.dense(), inputs) <= output_error(
        weight, nearest.dense(), inputs
    )
    for one in (found, nearest):
        assert not one.values[~mask].any()
        assert int(one.values.abs().max()) <= limit


@pytest.mark.parametrize("seed", range(3))
def test_shrunken_scales_pay_for_four_bits(seed: int) -> None:
    """What justifies the search: it is off for 8 bits, where it gains nothing."""
    weight, inputs = correlated(64, 192, seed)
    mask = brute_mask(64, 192, Pattern.parse("2:4"), seed)
    gram = inputs.t() @ inputs
    plain, searched = (
        gptq(weight * mask, mask, gram, 7, 64, shrink=shrink).dense() for shrink in ((1.0,), None)
    )
    weight = weight * mask
    assert output_error(weight, searched, inputs) < 0.97 * output_error(weight, plain, inputs)


def test_a_row_without_weights_and_a_weight_without_a_scale() -> None:
    weight, inputs = correlated(2, 40, 0)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    found = gptq(weight, mask, inputs.t() @ inputs, 7, 32)
    assert not found.scales[1].any()
    assert not found.values[1].any()
    weight[0, 0] = 1e9
    for solve in (
        lambda: rtn(weight, mask, 7, 32),
        lambda: gptq(weight, mask, inputs.t() @ inputs, 7, 32),
    ):
        with pytest.raises(ModelError, match=r"weight of 1e\+09 is too large"):
            solve()


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-8, 7), max_size=33))
def test_nibbles_round_trip(values: list[int]) -> None:
    given_ = torch.tensor(values, dtype=torch.int8)
    packed = pack_nibbles(given_)
    assert packed.dtype == torch.uint8
    wanted = [0] * math.ceil(len(values) / 2)
    for i, value in enumerate(values):
        wanted[i // 2] |= (value & 15) << (4 * (i % 2))
    assert packed.tolist() == wanted
    assert (unpack_nibbles(packed.numpy(), len(values)) == given_.numpy()).all()


def test_scaled_is_exact() -> None:
    values = torch.arange(-127, 127, dtype=torch.int8).reshape(2, 127)
    scales = torch.tensor([[0.1, 3.7e-5], [2e-8, 60000.0]], dtype=torch.float16)
    found = scaled(values, scales, 64)
    for row in range(2):
        for column in range(127):
            exact = int(values[row, column]) * float(scales[row, column // 64])
            assert float(found[row, column]) == exact


@pytest.mark.parametrize(("size", "group"), [(32, 32), (64, 64), (128, 64)])
def test_activation_error_is_what_a_loop_makes(size: int, group: int) -> None:
    weight, inputs = correlated(4, 80, 1, tokens=6)
    inputs[2, :group] = 0
    lost = torch.zeros_like(inputs)
    for token in range(6):
        for start in range(0, 80, group):
            own = inputs[token, start : start + group]
            scale = float(own.abs().max()) / 127
            for i, x in enumerate(own.tolist()):
                lost[token, start + i] = x - round(x / scale) * scale if scale else 0
    wanted = torch.linalg.norm(lost @ weight.t()) / torch.linalg.norm(inputs @ weight.t())
    assert activation_error(weight, inputs, size) == pytest.approx(float(wanted), rel=1e-3)
    assert activation_error(weight, inputs * 0, size) == 0
