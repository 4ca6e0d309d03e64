"""Swaps: the native loop, torch and brute force make the same exchanges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pattern import Pattern
from secateur.prune import swaps as module
from secateur.prune.masks import keep_highest
from secateur.prune.method import Problem, Solution, masked

PATTERNS = ["2:4", "4:8", "1:4", "50%", "70%", "2:4@4x1", "50%@8x1"]
PATHS = ["native", "torch"]
# fp32 against fp64; relative to the error of the row at first.
ROUNDING = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


def run(path: str, problem: Problem, start: Solution, **options: Any) -> Solution:
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr(module, "_native", None)
        else:
            assert module._native is not None, "installed without the native module"
        return module.swaps(problem, start, module.Settings(**options))


def problem_of(weight: torch.Tensor, gram: torch.Tensor, pattern: str) -> Problem:
    inputs: Any = SimpleNamespace(gram=gram)
    return Problem(weight, inputs, Pattern.parse(pattern))


def random_problem(
    rows: int, columns: int, pattern: str, seed: int, tokens: int = 300
) -> tuple[Problem, Solution]:
    """A layer of correlated inputs, and it pruned by magnitude with the kept weights changed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    mix = (mix + torch.eye(columns)) * torch.exp(0.5 * torch.randn(columns, generator=generator))
    x = (torch.randn(tokens, columns, generator=generator) + 0.2) @ mix
    problem = problem_of(weight, x.T @ x, pattern)
    changed = weight * (1 + 0.05 * torch.randn(rows, columns, generator=generator))
    return problem, masked(changed, keep_highest(weight.abs(), problem.pattern, "row"))


def errors(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """The exact error of each block row."""
    change = (problem.weight - weight).double()
    rows = ((change @ problem.gram.double()) * change).sum(dim=1)
    return rows.view(-1, problem.pattern.rows).sum(dim=1)


def trials(problem: Problem, now: Solution, block: int) -> torch.Tensor:
    """The errors of a block row after each swap that the pattern allows."""
    pattern = problem.pattern
    rows = slice(block * pattern.rows, (block + 1) * pattern.rows)
    change = (problem.weight[rows] - now.weight[rows]).double()
    kept, found = now.mask[rows][0], []
    for out in kept.nonzero()[:, 0].tolist():
        for back in (~kept).nonzero()[:, 0].tolist():
            if not pattern.is_nm or out // pattern.m == back // pattern.m:
                trial = change.clone()
                trial[:, out], trial[:, back] = problem.weight[rows, out], 0
                found.append(trial)
    if not found:  # a row that kept all or nothing
        return torch.full((1,), torch.inf, dtype=torch.float64)
    every = torch.stack(found)
    return ((every @ problem.gram.double()) * every).sum(dim=(1, 2))


def check_counts(problem: Problem, start: Solution, after: Solution) -> None:
    """As many weights as before; those that were removed for a while or for long are dense."""
    problem.pattern.check(after.mask)
    width = problem.pattern.m or problem.weight.shape[1]
    counts = [mask.reshape(-1, width).sum(dim=1) for mask in (start.mask, after.mask)]
    assert torch.equal(*counts)
    same = (after.weight == problem.weight) | (after.weight == start.weight)
    came = after.mask & ~start.mask
    assert same[after.mask].all()
    assert torch.equal(after.weight[came], problem.weight[came])
    assert not after.weight[~after.mask].any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (8, 192), (56, 8)])
def test_native_and_torch_make_the_same_swaps(pattern: str, rows: int, columns: int) -> None:
    problem, start = random_problem(rows, columns, pattern, seed=rows)
    native, plain = (run(path, problem, start) for path in PATHS)
    assert native.facts == plain.facts
    assert native.facts["swaps"] > 0
    assert torch.equal(native.mask, plain.mask)
    assert torch.equal(native.weight, plain.weight)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from([*PATTERNS, "3:4", "30%", "2:4@8x1"]),
    columns=st.sampled_from([8, 16, 24]),
    candidates=st.sampled_from([1, 3, 24]),
    seed=st.integers(0, 2**20),
)
def test_at_the_end_no_swap_helps(
    path: str, pattern: str, columns: int, candidates: int, seed: int
) -> None:
    problem, start = random_problem(8, columns, pattern, seed)
    after = run(path, problem, start, candidates=candidates)
    check_counts(problem, start, after)
    assert after.facts["rows_unfinished"] == 0
    first, reached = errors(problem, start.weight), errors(problem, after.weight)
    assert (reached <= first * (1 + 1e-6)).all()
    for block, least in enumerate(first * (module._LEAST_GAIN + ROUNDING)):
        assert trials(problem, after, block).min() >= reached[block] - least


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=30, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS), columns=st.sampled_from([8, 16]), seed=st.integers(0, 2**20)
)
def test_a_round_makes_the_best_swap_of_each_row(
    path: str, pattern: str, columns: int, seed: int
) -> None:
    problem, now = random_problem(8, columns, pattern, seed)
    for _ in range(3):
        first = errors(problem, now.weight)
        after = run(path, problem, now, rounds=1, candidates=columns)
        check_counts(problem, now, after)
        stayed = after.mask & now.mask
        assert torch.equal(after.weight[stayed], now.weight[stayed])
        reached = errors(problem, after.weight)
        for block in range(len(first)):
            best = torch.minimum(first[block], trials(problem, now, block).min())
            assert abs(reached[block] - best) <= ROUNDING * first[block]
        now = after


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_round_lowers_the_error_of_the_rows_that_swap(path: str, pattern: str) -> None:
    problem, start = random_problem(24, 32, pattern, seed=3)
    before, blocks = errors(problem, start.weight), 24 // problem.pattern.rows
    done = run(path, problem, start)
    last = 0
    for rounds in range(1, done.facts["rounds"] + 1):
        after = run(path, problem, start, rounds=rounds)
        reached = errors(problem, after.weight)
        assert (reached <= before * (1 + 1e-6)).all()
        assert after.facts["rounds"] == rounds
        swapped = after.facts["swaps"] - last
        assert int((reached < before * (1 - 1e-7)).sum()) <= swapped <= blocks
        assert after.facts["rows_unfinished"] == swapped * problem.pattern.rows
        before, last = reached, after.facts["swaps"]
    assert torch.equal(after.mask, done.mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_number_of_threads_changes_nothing(pattern: str) -> None:
    problem, start = random_problem(56, 64, pattern, seed=1)  # 56 and 7 blocks: not by 3
    one = run("native", problem, start)
    torch.set_num_threads(3)
    three = run("native", problem, start)
    torch.set_num_threads(1)
    assert torch.equal(one.mask, three.mask)
    assert torch.equal(one.weight, three.weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_never_was_is_removed_first(path: str, pattern: str) -> None:
    """Inputs that are always 0 and weights that are 0 cost nothing, so others take their place."""
    problem, _ = random_problem(16, 32, pattern, seed=5)
    gram, weight = problem.gram.clone(), problem.weight.clone()
    gram[[0, 9]] = 0
    gram[:, [0, 9]] = 0
    weight[:, [5, 18]] = 0
    weight[8:] = 0
    problem = problem_of(weight, gram, pattern)
    score = torch.zeros(16, 32)
    score[:, [0, 5, 9, 18]] = 1  # keep these
    score += torch.linspace(0, 0.01, 32)
    start = masked(weight, keep_highest(score, problem.pattern, "row"))
    after = run(path, problem, start)
    check_counts(problem, start, after)
    assert after.weight.isfinite().all()
    first, reached = errors(problem, start.weight), errors(problem, after.weight)
    height = problem.pattern.rows
    assert (reached[: 8 // height] < first[: 8 // height]).all()
    assert torch.equal(after.mask[8:], start.mask[8:])  # no error, no swap
    for block in range(len(first)):
        least = first[block] * (module._LEAST_GAIN + ROUNDING)
        assert trials(problem, after, block).min() >= reached[block] - least


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_with_nan_stays_and_the_others_do_not(path: str, pattern: str) -> None:
    problem, start = random_problem(32, 32, pattern, seed=6)
    whole = run(path, problem, start)
    height = problem.pattern.rows
    start.weight[height, 3] = problem.weight[height, 3] = torch.nan
    after = run(path, problem, start)
    block = slice(height, 2 * height)
    assert torch.equal(after.mask[block], start.mask[block])
    others = torch.arange(32) // height != 1
    assert torch.equal(after.mask[others], whole.mask[others])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", ["2:4", "50%", "50%@8x1"])
def test_inputs_of_any_strides_stay_as_they_were(path: str, pattern: str) -> None:
    problem, start = random_problem(16, 32, pattern, seed=7)
    plain = run(path, problem, start)
    strided = problem_of(
        problem.weight.T.contiguous().T, problem.gram.repeat(1, 2)[:, :32], pattern
    )
    start_strided = Solution(start.mask.T.contiguous().T, start.weight.repeat(1, 2)[:, 32:])
    inputs = (strided.weight, strided.gram, start_strided.mask, start_strided.weight)
    before = [tensor.clone() for tensor in inputs]
    after = run(path, strided, start_strided)
    assert torch.equal(after.mask, plain.mask)
    assert torch.equal(after.weight, plain.weight)
    assert all(map(torch.equal, inputs, before))


def test_shapes_that_do_not_agree_are_refused() -> None:
    assert module._native is not None, "installed without the native module"
    gram, layer = torch.eye(8), torch.zeros(2, 1, 8)
    kept, least = torch.ones(2, 8, dtype=torch.bool), torch.zeros(2)
    made = torch.zeros(2, dtype=torch.int64)

    def swap(value: torch.Tensor = layer, kept: torch.Tensor = kept, m: int = 4) -> None:
        assert module._native is not None
        slope = torch.zeros(2, 1, 8)
        module._native.swap(gram, layer, value, kept, slope, least, made, m, 24, 10, 1)

    swap()
    for wrong in ({"value": torch.zeros(2, 2, 8)}, {"kept": kept[:1]}, {"m": 3}):
        with pytest.raises(ValueError, match=r"shapes|groups"):
            swap(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        swap(layer.double())
