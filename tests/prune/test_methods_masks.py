"""Masks: counts against brute force, and valid patterns from every chain."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pattern import Pattern
from secateur.prune.masks import drop_lowest, keep_highest, row_chunks
from secateur.prune.method import Problem
from secateur.prune.methods import find_method
from secateur.statistics import GradientStatistics, InputStatistics

PATTERNS = ["2:4", "4:8", "1:4", "50%", "30%", "2:4@4x1", "50%@8x1"]
CHAINS = [
    "magnitude",
    "wanda",
    "ria",
    "gblm",
    "sparsegpt",
    "admm",
    "alps",
    "wanda+dsnot",
    "magnitude+swaps",
    "sparsegpt+swaps+lsq",
    "wanda+dsnot+swaps+lsq",
]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_problem(
    rows: int, columns: int, pattern: str, seed: int, tokens: int = 24, dead: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    scale = torch.exp(torch.randn(columns, generator=generator))
    needs = frozenset({"norms", "gram", "moments"})
    inputs = InputStatistics(columns, 2, torch.device("cpu"), needs)  # type: ignore[arg-type]
    gradients = GradientStatistics("l2")
    for _ in range(2):
        x = (torch.randn(1, tokens, columns, generator=generator) + 0.5) @ mix * scale
        x[:, :, :dead] = 0
        inputs.update(x)
        gradients.update(torch.randn(rows, columns, generator=generator))
    return Problem(weight, inputs, Pattern.parse(pattern), gradients=gradients.result())


def best_by_brute_force(scores: list[float], removed: int) -> float:
    """The largest sum of kept scores."""
    return max(sum(kept) for kept in combinations(scores, len(scores) - removed))


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "50%", "30%", "2:4@4x1", "50%@4x1"]),
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
)
def test_keep_highest_keeps_the_most(pattern: str, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(4, 8, generator=generator)
    score = (score * 4).round() if ties else score
    shape = Pattern.parse(pattern)
    mask = keep_highest(score, shape, "row")
    shape.check(mask)
    blocks = score.view(-1, shape.rows, 8).sum(dim=1)
    kept = mask[:: shape.rows]
    width = shape.m or 8
    groups, kept = blocks.reshape(-1, width), kept.reshape(-1, width)
    removed = shape.m - shape.n if shape.is_nm else shape.removed_of(8)
    for group, chosen in zip(groups, kept, strict=True):
        most = best_by_brute_force(group.tolist(), removed)
        assert float(group[chosen].sum()) == pytest.approx(most, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    width=st.integers(60, 80),
    values=st.integers(1, 30),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_long_rows_drop_what_a_stable_sort_drops(
    rows: int, width: int, values: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(values, (rows, width), generator=generator).float()
    count = data.draw(st.integers(0, width))
    expected = torch.ones_like(score, dtype=torch.bool)
    expected.scatter_(1, score.argsort(dim=1, stable=True)[:, :count], False)
    assert torch.equal(drop_lowest(score, count), expected)


def test_chunks_cover_all_rows_in_whole_blocks() -> None:
    chunks = list(row_chunks(40, 1 << 25, Pattern.parse("50%@4x1")))
    assert [row for chunk in chunks for row in range(40)[chunk]] == list(range(40))
    assert all(chunk.start % 4 == 0 for chunk in chunks)
    assert len(chunks) > 1


@pytest.mark.parametrize("chain", CHAINS)
@settings(max_examples=8, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 3),
    columns=st.integers(1, 10),
    seed=st.integers(0, 2**20),
    tokens=st.sampled_from([2, 40]),
    dead=st.sampled_from([0, 0, 3, 8]),
)
def test_masks_are_valid(
    chain: str, pattern: str, rows: int, columns: int, seed: int, tokens: int, dead: int
) -> None:
    problem = make_problem(8 * rows, 8 * columns, pattern, seed, tokens, dead)
    solution = find_method(chain).solve(problem)
    problem.pattern.check(solution.mask)
    assert solution.weight.isfinite().all()
    assert not solution.weight[~solution.mask].any()
    assert solution.weight.shape == problem.weight.shape


@pytest.mark.parametrize("pattern", ["50%", "37.5%", "50%@8x1"])
def test_wanda_variant_is_exact_over_the_layer_and_uneven_over_rows(pattern: str) -> None:
    problem = make_problem(32, 80, pattern, 1)
    mask = find_method("wanda", {"wanda.variant": True}).solve(problem).mask
    problem.pattern.check(mask)
    assert len(set(mask.sum(dim=1).tolist())) > 1


@pytest.mark.parametrize("chain", CHAINS)
def test_a_problem_is_left_as_it_was(chain: str) -> None:
    problem = make_problem(8, 32, "2:4", 3)
    before = problem.weight.clone()
    gram = problem.gram.clone()
    find_method(chain).solve(problem)
    assert torch.equal(problem.weight, before)
    assert torch.equal(problem.gram, gram)
