"""Methods that solve for weights, and refinements, against plain references and brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from secateur.errors import ModelError
from secateur.gram import damped, inverse_factor, row_errors
from secateur.pattern import Pattern
from secateur.prune.masks import keep_highest
from secateur.prune.method import Problem
from secateur.prune.methods import find_method
from secateur.statistics import InputStatistics

FIXTURE = Path(__file__).resolve().parent.parent / "goldens" / "a_inputs.safetensors"


pytestmark = pytest.mark.usefixtures("one_thread")


def problem_of(weight: torch.Tensor, activations: torch.Tensor, pattern: str) -> Problem:
    sequences, _, width = activations.shape
    needs = frozenset({"norms", "gram", "moments"})
    inputs = InputStatistics(width, sequences, torch.device("cpu"), needs)  # type: ignore[arg-type]
    for sequence in activations:
        inputs.update(sequence[None])
    return Problem(weight, inputs, Pattern.parse(pattern))


def fixture_a(pattern: str) -> Problem:
    tensors = load_file(FIXTURE)
    return problem_of(tensors["weight"], tensors["activations"], pattern)


def random_problem(
    rows: int, columns: int, pattern: str, seed: int, tokens: int = 40, dead: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    scale = torch.exp(torch.randn(columns, generator=generator))
    x = (torch.randn(2, tokens, columns, generator=generator) + 0.3) @ mix * scale
    x[:, :, :dead] = 0
    return problem_of(weight, x, pattern)


def error_of(problem: Problem, chain: str, **options: Any) -> float:
    settings = {key.replace("__", "."): value for key, value in options.items()}
    solution = find_method(chain, settings).solve(problem)
    return problem.statistics.relative_error(problem.weight, solution.weight)


# The reference column of the design's table, and what the chains must reach.
@pytest.mark.parametrize(
    ("chain", "pattern", "at_most"),
    [
        ("wanda", "50%", 0.01875),
        ("sparsegpt", "50%", 0.01345),
        ("wanda+swaps", "50%", 0.0122),
        ("wanda+lsq", "50%", 0.00795),
        ("wanda+swaps+lsq", "50%", 0.00605),
        ("alps", "50%", 0.0042),
        ("wanda", "2:4", 0.04825),
        ("sparsegpt", "2:4", 0.02775),
        ("wanda+swaps", "2:4", 0.0331),
        ("wanda+lsq", "2:4", 0.02065),
        ("sparsegpt+lsq", "2:4", 0.01705),
        ("sparsegpt+swaps+lsq", "2:4", 0.0168),
        ("wanda+swaps+lsq", "2:4", 0.0170),
        ("alps", "2:4", 0.0125),
    ],
)
def test_errors_on_the_fixture(chain: str, pattern: str, at_most: float) -> None:
    assert error_of(fixture_a(pattern), chain) <= at_most


@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4", "1:4", "50%@8x1", "2:4@4x1"])
def test_the_order_of_methods(pattern: str) -> None:
    problem = fixture_a(pattern)
    magnitude, sparsegpt = error_of(problem, "magnitude"), error_of(problem, "sparsegpt")
    for chain in ("sparsegpt", "admm", "alps"):
        assert error_of(problem, chain) < 0.5 * magnitude
    for chain in ("wanda+swaps+lsq", "sparsegpt+swaps+lsq"):
        assert error_of(problem, chain) < sparsegpt


def optimal_brain_surgeon(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT one column at a time, with the inverse of what is left, in fp64."""
    weight, gram = problem.weight.double(), damped(problem.gram, 0.01).double()
    rows, columns = weight.shape
    pattern, mask = problem.pattern, torch.ones(rows, columns, dtype=torch.bool)
    score = torch.zeros_like(weight)
    for j in range(columns):
        inverse = torch.linalg.inv(gram[j:, j:])
        if pattern.is_nm and j % pattern.m == 0:
            for k in range(j, j + pattern.m):
                score[:, k] = weight[:, k] ** 2 / torch.linalg.inv(gram[k:, k:])[0, 0]
            group = slice(j, j + pattern.m)
            mask[:, group] = keep_highest(score[:, group], pattern, "row")
        elif j == 0:
            for k in range(columns):
                score[:, k] = weight[:, k] ** 2 / torch.linalg.inv(gram[k:, k:])[0, 0]
            mask = keep_highest(score, pattern, "layer")
        step = weight[:, j] / inverse[0, 0] * ~mask[:, j]
        weight[:, j:] -= step[:, None] * inverse[0]
    return mask, weight * mask


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%", "30%", "50%@4x1", "2:4@4x1"])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern: str) -> None:
    problem = random_problem(8, 24, pattern, 5, tokens=60)
    mask, weight = optimal_brain_surgeon(problem)
    solution = find_method("sparsegpt").solve(problem)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("blocksize", [1, 5, 8, 30])
def test_sparsegpt_in_blocks_has_exact_counts(blocksize: int) -> None:
    for pattern in ("30%", "2:4", "37.5%@8x1"):
        problem = random_problem(16, 20, pattern, 2)
        chain = find_method("sparsegpt", {"sparsegpt.blocksize": blocksize})
        solution = chain.solve(problem)
        problem.pattern.check(solution.mask)
        blocks = 16 * 20 // problem.pattern.rows
        removed = int((~solution.mask).sum()) // problem.pattern.rows
        assert removed == problem.pattern.removed_of(blocks)


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "50%", "30%", "1:4", "50%@4x1"]),
    columns=st.sampled_from([4, 8, 12]),
    seed=st.integers(0, 2**20),
)
def test_lsq_is_the_least_squares_solution(pattern: str, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 30, columns, generator=generator)
    weight = torch.randn(4, columns, generator=generator)
    problem = problem_of(weight, x, pattern)
    options = {"lsq.damping": 0, "lsq.iterations": 100, "lsq.tolerance": 1e-7}
    solution = find_method("wanda+lsq", options).solve(problem)
    tokens = x.flatten(0, 1).double()
    for row, mask, found in zip(weight, solution.mask, solution.weight, strict=True):
        best = torch.linalg.lstsq(tokens[:, mask], (tokens @ row.double())[:, None]).solution
        torch.testing.assert_close(found[mask].double(), best[:, 0], rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    start=st.sampled_from(["wanda", "magnitude", "sparsegpt"]),
    pattern=st.sampled_from(["2:4", "1:4", "4:8", "50%", "30%", "50%@4x1", "2:4@4x1"]),
    columns=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**20),
)
def test_no_swap_is_left_that_helps(start: str, pattern: str, columns: int, seed: int) -> None:
    problem = random_problem(8, columns, pattern, seed)
    before = find_method(start).solve(problem)
    after = find_method(f"{start}+swaps").solve(problem)
    problem.pattern.check(after.mask)
    height, weight = problem.pattern.rows, problem.weight
    assert torch.equal(before.mask.sum(dim=1), after.mask.sum(dim=1))

    gram = problem.gram.double()

    def errors(now: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return row_errors((target - now).double(), gram).view(-1, height).sum(dim=1)

    reached = errors(after.weight, weight)
    assert (reached <= errors(before.weight, weight) * (1 + 1e-5)).all()
    for block in range(len(weight) // height):
        rows = slice(block * height, (block + 1) * height)
        kept = after.mask[rows][0]
        trials = []
        for out in kept.nonzero()[:, 0].tolist():
            for back in (~kept).nonzero()[:, 0].tolist():
                if problem.pattern.is_nm and out // problem.pattern.m != back // problem.pattern.m:
                    continue
                trial = after.weight.clone()
                trial[rows, out], trial[rows, back] = 0, weight[rows, back]
                trials.append(trial[rows])
        if not trials:  # a row that kept all or nothing
            continue
        targets = weight[rows].repeat(len(trials), 1)
        assert (errors(torch.cat(trials), targets) >= reached[block] * (1 - 1e-3) - 1e-4).all()


def test_every_round_of_swaps_lowers_the_error() -> None:
    for pattern in ("2:4", "50%"):
        problem = fixture_a(pattern)
        reached = [error_of(problem, "wanda")]
        for rounds in (1, 2, 3, 5, 8):
            reached.append(error_of(problem, "wanda+swaps", swaps__rounds=rounds))
        assert reached == sorted(reached, reverse=True)
        assert reached[-1] < 0.8 * reached[0]


@pytest.mark.parametrize("start", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["50%", "2:4", "4:8", "50%@8x1"])
def test_dsnot_never_raises_a_rows_true_error(start: str, pattern: str) -> None:
    problem = fixture_a(pattern)
    before = find_method(start).solve(problem)
    after = find_method(f"{start}+dsnot").solve(problem)
    problem.pattern.check(after.mask)
    assert after.facts["dsnot.rows_reverted"] > 0
    assert after.facts["dsnot.swaps"] > 0 or problem.pattern.rows > 1
    height = problem.pattern.rows

    def errors(now: torch.Tensor) -> torch.Tensor:
        return row_errors(problem.weight - now, problem.gram).view(-1, height).sum(dim=1)

    assert (errors(after.weight) <= errors(before.weight) * (1 + 1e-6)).all()


def test_dsnot_lowers_the_expected_error_and_obeys_its_threshold() -> None:
    problem = fixture_a("50%")
    mean = problem.statistics.mean

    def expected(now: torch.Tensor) -> float:
        return float(((problem.weight - now) @ mean).abs().mean())

    before = find_method("wanda").solve(problem)
    after = find_method("wanda+dsnot").solve(problem)
    assert expected(after.weight) < expected(before.weight)
    idle = find_method("wanda+dsnot", {"dsnot.threshold": 1e6}).solve(problem)
    assert idle.facts["dsnot.swaps"] == 0
    assert torch.equal(idle.mask, before.mask)
    signs = find_method("wanda+dsnot", {"dsnot.same_sign": True}).solve(problem)
    moved = (problem.weight - signs.weight) @ mean
    assert (moved * ((problem.weight - before.weight) @ mean) >= -1e-5).all()


@pytest.mark.parametrize("chain", ["sparsegpt", "admm", "alps", "wanda+dsnot+swaps+lsq"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_few_tokens_and_dead_inputs(chain: str, pattern: str) -> None:
    """A Gram matrix of rank 3 of 32, with four inputs that are always 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 32, generator=generator) * 1e3
    x[:, :, 4:8] = 0
    problem = problem_of(torch.randn(8, 32, generator=generator), x, pattern)
    solution = find_method(chain).solve(problem)
    problem.pattern.check(solution.mask)
    assert solution.weight.isfinite().all()
    assert error_of(problem, chain) < error_of(problem, "magnitude")


def test_sparsegpt_zeroes_dead_inputs_and_says_so() -> None:
    problem = random_problem(8, 16, "2:4", 0, dead=3)
    solution = find_method("sparsegpt").solve(problem)
    assert solution.facts == {"damping_retries": 0, "dead_inputs": 3}
    assert not solution.weight[:, :3].any()


def test_a_failed_factorisation_is_damped_counted_and_right() -> None:
    vector = torch.linspace(1, 2, 48)
    gram = torch.outer(vector, vector) * 1e4
    upper, retries = inverse_factor(gram, 0.0)
    assert retries > 0
    inverse = torch.linalg.inv(damped(gram, max(0.0, 1e-6) * 10**retries).double())
    torch.testing.assert_close(
        (upper.T @ upper).double(), inverse, rtol=0.1, atol=float(inverse.abs().max()) * 0.1
    )
    _, none = inverse_factor(gram, 0.01)
    assert none == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_overflowed_are_refused(value: float) -> None:
    gram = torch.eye(4)
    gram[1, 1] = value
    gram[2, 3] = value
    with pytest.raises(ModelError, match="NaN"):
        inverse_factor(gram, 0.01)


def test_inputs_that_are_all_zero_prune_by_count_alone() -> None:
    problem = problem_of(torch.randn(8, 16), torch.zeros(1, 4, 16), "50%")
    for chain in ("sparsegpt", "admm", "alps", "wanda+dsnot+swaps+lsq"):
        solution = find_method(chain).solve(problem)
        problem.pattern.check(solution.mask)
        assert solution.weight.isfinite().all()


@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4", "4:8", "1:4", "50%@4x1", "2:4@8x1"])
def test_sparsegpt_in_columns_is_the_same_natively(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.prune import sparsegpt

    assert sparsegpt._native is not None
    problem = random_problem(24, 200, pattern, seed=3, tokens=300, dead=3)
    native = find_method("sparsegpt").solve(problem)
    monkeypatch.setattr(sparsegpt, "_native", None)
    plain = find_method("sparsegpt").solve(problem)
    assert torch.equal(native.mask, plain.mask)
    torch.testing.assert_close(native.weight, plain.weight)
    for solution in (native, plain):
        assert not torch.signbit(solution.weight[~solution.mask]).any()


def test_linears_with_the_same_inputs_share_one_factorisation() -> None:
    """What is derived for the first must be right for the second, whatever its weights are."""
    for method in ("sparsegpt", "alps"):
        first, second = (random_problem(8, 32, "50%", seed=seed) for seed in (0, 1))
        alone = find_method(method).solve(second)
        shared = Problem(first.weight, second.inputs, second.pattern)
        find_method(method).solve(shared)
        assert second.statistics._derived
        after = find_method(method).solve(second)
        assert torch.equal(alone.mask, after.mask)
        assert torch.equal(alone.weight, after.weight)
