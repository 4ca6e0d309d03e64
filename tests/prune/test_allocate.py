"""Allocations: parity with the authors' code, and an exact budget whatever the measures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.prune.allocate import (
    ALLOCATIONS,
    HIGHEST,
    Compat,
    Fit,
    find_allocation,
    outlier_share,
    patterns_of,
    tail_exponent,
)

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
SPREADS = {"owl": 0.5, "alphapruning": 0.95}

measures_and_weights = st.lists(
    st.tuples(st.floats(0.001, 50), st.integers(1, 10**9)), min_size=1, max_size=40
)
targets = st.floats(0.01, HIGHEST)


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.safetensors")


# Parity with the authors' code: see goldens/README.md.


def test_owl_matches_the_authors_code() -> None:
    expected = golden("owl_wanda_70")
    norms = expected["activations"].square().sum(dim=1).mean(dim=0).sqrt()
    scores = [expected[f"weight_{block}"].abs() * norms for block in range(4)]
    owl = find_allocation("owl", {"threshold": 3})
    measures = [owl.measure([score], "reference") for score in scores]
    percents = 100 * torch.tensor(measures)
    torch.testing.assert_close(percents, expected["outlier_pct"])
    ratios = owl.ratios(measures, [64 * 96] * 4, 0.7, "reference")
    # The golden holds what Wanda made of the ratios: rows round down to whole columns.
    achieved = torch.tensor([math.floor(96 * ratio) / 96 for ratio in ratios])
    torch.testing.assert_close(achieved, expected["achieved_sparsity"])


@pytest.mark.parametrize(("fit", "tensor"), [("peak", "alpha_peak"), ("median", "alpha_mid")])
def test_alphapruning_matches_the_authors_exponents(fit: Fit, tensor: str) -> None:
    expected = golden("alphapruning")
    alphas = [tail_exponent(expected[f"weight_{i}"], fit, "reference") for i in range(4)]
    torch.testing.assert_close(torch.tensor(alphas), expected[tensor], rtol=1e-4, atol=0)


def test_alphapruning_matches_the_authors_ratios() -> None:
    expected = golden("alphapruning")
    allocation = ALLOCATIONS["alphapruning"]
    measures = [allocation.measure([expected[f"weight_{i}"]], "reference") for i in range(4)]
    ratios = allocation.ratios(measures, [64 * 96] * 4, 0.7, "reference")
    wanted = expected["ratio_p70_eps03_peak"]
    torch.testing.assert_close(torch.tensor(ratios), wanted, rtol=1e-4, atol=0)
    # The first of them removes more than there is; ours gives the rest to the others.
    assert ratios[0] > 1
    limited = allocation.ratios(measures, [64 * 96] * 4, 0.7)
    assert limited[0] == HIGHEST
    assert math.fsum(limited) / 4 == pytest.approx(0.7, abs=1e-15)


# Measures.


def test_outliers_are_counted_as_if_the_block_were_one_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(*shape, generator=generator) ** 4 for shape in [(8, 16), (4, 8), (16, 8)]]
    whole = torch.cat([score.flatten() for score in scores])
    assert outlier_share(scores, 3) == float((whole > 3 * whole.mean()).double().mean())
    assert outlier_share([torch.zeros(2, 2)], 3) == 0


def slow_exponent(weight: torch.Tensor, compat: Compat) -> float:
    """The peak fit, step by step as in the authors' code, on fp64 numpy values."""
    values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    edges = np.logspace(np.log10(values[0]), np.log10(values[-1]), 101)
    counts, _ = np.histogram(np.log10(values), bins=100)
    peak = edges[counts.argmax()]
    least = np.log10(0.95 * peak) if compat == "reference" else 0.95 * peak
    best = (2.0, math.nan)
    for k in range(len(values) - 1):
        if not least <= values[k] <= 1.5 * peak:
            continue
        tail = values[k:]
        alpha = 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)
        fitted = [1 - (value / tail[0]) ** (1 - alpha) for value in tail]
        distance = max(abs(fit - i / len(tail)) for i, fit in enumerate(fitted))
        best = min(best, (distance, alpha))
    return best[1]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(20, 60),
    columns=st.integers(20, 60),
    power=st.floats(0.0, 2.0),
    seed=st.integers(0, 2**20),
    compat=st.sampled_from(["exact", "reference"]),
)
def test_exponent_matches_the_slow_way(
    rows: int, columns: int, power: float, seed: int, compat: Compat
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, columns + 1).float() ** -power
    weight = torch.randn(rows, columns, generator=generator) * scale
    slow = slow_exponent(weight, compat)
    # fp32 eigenvalues may fall into the next bin of the histogram.
    loose = compat == "reference"
    fast = tail_exponent(weight, "peak", compat)
    assert fast == pytest.approx(slow, rel=1e-3 if loose else 1e-6)


@pytest.mark.parametrize("fit", ["peak", "median"])
@pytest.mark.parametrize("alpha", [2.0, 3.0, 5.0])
def test_exponent_of_a_power_law_is_its_exponent(fit: Fit, alpha: float) -> None:
    levels = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    eigenvalues = levels ** (-1 / (alpha - 1))
    assert tail_exponent(eigenvalues.sqrt().diag(), fit) == pytest.approx(alpha, rel=0.05)


@pytest.mark.parametrize("fit", ["peak", "median"])
def test_exponent_ignores_scale_side_and_zeros(fit: Fit) -> None:
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    alpha = tail_exponent(weight, fit)
    assert tail_exponent(4 * weight, fit) == pytest.approx(alpha, rel=1e-9)
    assert tail_exponent(weight.t(), fit) == pytest.approx(alpha, rel=1e-9)
    padded = torch.cat([weight, torch.zeros(10, 60)])
    assert tail_exponent(padded, fit) == pytest.approx(alpha, rel=1e-9)


def test_the_widest_spectrum_has_an_exponent() -> None:
    # 14.9 decades, the most that is not rounding; the fullest bin's values lie at its upper end.
    eigenvalues = 10 ** torch.tensor([0.0, 7.594, 7.595, 7.596, 14.9], dtype=torch.float64)
    assert 1 < tail_exponent(eigenvalues.sqrt().diag()) < 3


def test_a_block_averages_its_linears() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(30, 20, generator=generator) for _ in range(3)]
    mean = sum(tail_exponent(weight) for weight in weights) / 3
    assert ALLOCATIONS["alphapruning"].measure(weights) == pytest.approx(mean)


def test_what_cannot_be_measured_is_refused() -> None:
    damaged = torch.tensor([[1.0, math.nan]])
    with pytest.raises(ModelError, match="scores of a block hold NaN"):
        ALLOCATIONS["owl"].measure([damaged])
    with pytest.raises(ModelError, match="weights of a block hold NaN"):
        ALLOCATIONS["alphapruning"].measure([damaged])
    for weight in (torch.zeros(8, 8), torch.eye(8)):
        for fit in ("peak", "median"):
            with pytest.raises(ModelError, match="have no spectrum"):
                find_allocation("alphapruning", {"fit": fit}).measure([weight])


# Ratios.


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["owl", "alphapruning"]),
    blocks=measures_and_weights,
    target=targets,
    spread=st.floats(0, 1),
)
def test_the_budget_is_met_within_bounds(
    name: str, blocks: list[tuple[float, int]], target: float, spread: float
) -> None:
    allocation = find_allocation(name, {"spread": spread * SPREADS[name]})
    measures, weights = zip(*blocks, strict=True)
    ratios = allocation.ratios(measures, weights, target)
    assert len(ratios) == len(blocks)
    assert all(0 <= ratio <= HIGHEST for ratio in ratios)
    removed = math.fsum(w * ratio for w, ratio in zip(weights, ratios, strict=True))
    assert removed / sum(weights) == pytest.approx(target, abs=1e-12)
    # More outliers keep more; larger exponents lose more; the same measure loses the same.
    by_measure = dict(zip(measures, ratios, strict=True))
    assert ratios == [by_measure[measure] for measure in measures]
    rising = [by_measure[measure] for measure in sorted(by_measure)]
    assert rising == sorted(rising, reverse=name == "owl")


@settings(max_examples=100, deadline=None)
@given(blocks=measures_and_weights, target=targets)
def test_what_is_cut_off_goes_to_the_others_alike(
    blocks: list[tuple[float, int]], target: float
) -> None:
    measures, weights = zip(*blocks, strict=True)
    low, high = min(measures), max(measures)
    levels = [(m - low) / (high - low) if high > low else 0.5 for m in measures]
    for name in ("owl", "alphapruning"):
        settings = {"spread": SPREADS[name]}
        ratios = find_allocation(name, settings).ratios(measures, weights, target)
        # The c of the formula: one for all blocks between the bounds.
        constants = [
            ratio + 2 * 0.5 * level if name == "owl" else ratio / (1 + 0.95 * (2 * level - 1))
            for ratio, level in zip(ratios, levels, strict=True)
        ]
        pairs = list(zip(ratios, constants, strict=True))
        free = [c for ratio, c in pairs if 1e-12 < ratio < HIGHEST - 1e-12]
        if free:
            assert max(free) - min(free) < 1e-9
            assert all(c <= min(free) + 1e-9 for ratio, c in pairs if ratio == HIGHEST)
            assert all(c >= max(free) - 1e-9 for ratio, c in pairs if ratio == 0)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("compat", ["exact", "reference"])
def test_equal_blocks_get_the_target(name: str, compat: Compat) -> None:
    ratios = ALLOCATIONS[name].ratios([2.5] * 3, [10, 20, 30], 0.6, compat)
    assert ratios == pytest.approx([0.6] * 3, abs=1e-15)


@pytest.mark.parametrize("name", ["owl", "alphapruning"])
def test_without_bounds_and_with_equal_blocks_both_ways_agree(name: str) -> None:
    allocation, measures = ALLOCATIONS[name], [3.0, 1.0, 2.0, 1.5]
    exact = allocation.ratios(measures, [7] * 4, 0.5)
    assert exact == pytest.approx(allocation.ratios(measures, [7] * 4, 0.5, "reference"))
    width = {"owl": 0.16, "alphapruning": None}[name]
    assert width is None or max(exact) - min(exact) == pytest.approx(width)


def test_alphapruning_weighs_blocks_by_their_size() -> None:
    ratios = ALLOCATIONS["alphapruning"].ratios([1.0, 2.0], [300, 100], 0.5, "reference")
    assert (300 * ratios[0] + 100 * ratios[1]) / 400 == pytest.approx(0.5)
    assert ratios[1] / ratios[0] == pytest.approx(1.3 / 0.7)


@pytest.mark.parametrize("name", ["owl", "alphapruning"])
def test_a_target_above_the_highest_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="96 % cannot be allocated"):
        ALLOCATIONS[name].ratios([1.0, 2.0], [1, 1], 0.96)
    assert ALLOCATIONS["uniform"].ratios([0.0, 0.0], [1, 1], 0.96) == [0.96, 0.96]


def test_uniform_reads_nothing() -> None:
    uniform = ALLOCATIONS["uniform"]
    assert uniform.needs == "nothing"
    assert uniform.measure([]) == 0


# Patterns.


@settings(max_examples=100, deadline=None)
@given(
    blocks=measures_and_weights,
    target=targets,
    decimals=st.sampled_from([2, 3, 4]),
    rows=st.sampled_from([1, 8]),
)
def test_patterns_stay_near_the_budget(
    blocks: list[tuple[float, int]], target: float, decimals: int, rows: int
) -> None:
    measures, weights = zip(*blocks, strict=True)
    ratios = find_allocation("owl", {"spread": 0.5}).ratios(measures, weights, target)
    wanted = Pattern.parse("50%@8x1" if rows == 8 else "50%")
    patterns = patterns_of(ratios, wanted, decimals)
    assert all(pattern.is_dense or pattern.rows == rows for pattern in patterns)
    assert all(Pattern.parse(str(pattern)) == pattern for pattern in patterns)
    removed = math.fsum(w * float(p.removed) for w, p in zip(weights, patterns, strict=True))
    assert abs(removed / sum(weights) - target) <= 0.5 * 10.0 ** -(decimals + 2) + 1e-12


def test_patterns_are_written_as_percentages() -> None:
    patterns = patterns_of([0.5, 0.61234, 0.0], Pattern.parse("50%@8x1"))
    assert [str(pattern) for pattern in patterns] == ["50%@8x1", "61.23%@8x1", "dense"]


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
def test_patterns_without_a_percentage_leave_nothing_to_allocate(pattern: str) -> None:
    with pytest.raises(UsageError, match="nothing to allocate"):
        patterns_of([0.5], Pattern.parse(pattern))


@pytest.mark.parametrize("ratio", [1.0584, 1.0, -0.01])
def test_impossible_sparsities_of_the_authors_code_are_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="% of a block"):
        patterns_of([0.5, ratio], Pattern.parse("70%"))


# Looking up.


def test_settings_are_read_and_checked() -> None:
    assert find_allocation("owl").settings.threshold == 5
    assert find_allocation("owl", {"threshold": 3}).settings.threshold == 3
    assert find_allocation("alphapruning", {"fit": "median"}).settings.fit == "median"
    with pytest.raises(UsageError, match="unknown key 'treshold'"):
        find_allocation("owl", {"treshold": 3})
    with pytest.raises(UsageError, match="settings of alphapruning"):
        find_allocation("alphapruning", {"spread": 1.5})
    with pytest.raises(UsageError, match="did you mean 'owl'"):
        find_allocation("owls")
