"""Statistics of inputs and gradients against plain sums in fp64."""

from __future__ import annotations

import pytest
import torch

from secateur.statistics import GradientStatistics, InputStatistics, Need

CPU = torch.device("cpu")


def collect(x: torch.Tensor, batch: int, *needs: Need) -> InputStatistics:
    inputs = InputStatistics(x.shape[-1], len(x), CPU, frozenset(needs))
    for start in range(0, len(x), batch):
        inputs.update(x[start : start + batch])
    return inputs


@pytest.mark.parametrize("batch", [1, 3])
def test_sums_do_not_depend_on_batches(batch: int) -> None:
    x = torch.randn(6, 10, 8) * torch.linspace(0.1, 3, 8) + torch.linspace(-2, 5, 8)
    inputs, flat = collect(x, batch, "norms", "gram", "moments"), x.double().flatten(0, 1)
    close = torch.testing.assert_close
    close(inputs.square_norm.double(), flat.square().sum(0) / 6, rtol=1e-5, atol=1e-5)
    close(inputs.gram.double(), flat.T @ flat, rtol=1e-5, atol=1e-4)
    close(inputs.sequence_sum.double(), flat.sum(0) / 6, rtol=1e-5, atol=1e-5)
    close(inputs.mean.double(), flat.mean(0), rtol=1e-6, atol=1e-6)
    close(inputs.variance.double(), flat.var(0, correction=0), rtol=1e-5, atol=1e-6)
    within = x.double().var(dim=1, correction=0).mean(0)
    close(inputs.within_variance.double(), within, rtol=1e-5, atol=1e-6)
    assert (inputs.sequences, inputs.tokens) == (6, 60)


def test_the_gram_matrix_keeps_its_precision_over_many_sequences() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 16, 6) + 30
    flat = x.double().flatten(0, 1)
    exact = flat.T @ flat
    assert float(((collect(x, 1, "gram").gram - exact) / exact).abs().max()) < 5e-6


def test_the_variance_does_not_cancel() -> None:
    x = torch.randn(50, 16, 4) * 1e-2 + 100
    found = collect(x, 1, "moments").variance.double()
    exact = x.double().flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


def test_the_relative_error_is_exact_with_a_gram_matrix_and_near_without() -> None:
    torch.manual_seed(0)
    x, before = torch.randn(4, 512, 16), torch.randn(8, 16)
    after = before * (torch.rand(8, 16) > 0.5)
    flat = x.double().flatten(0, 1)
    error = (flat @ (before - after).double().T).square().sum()
    exact = float(error / (flat @ before.double().T).square().sum())
    with_gram = collect(x, 1, "gram")
    assert with_gram.has_gram
    assert with_gram.relative_error(before, after) == pytest.approx(exact, rel=1e-5)
    assert collect(x, 1).relative_error(before, after) == pytest.approx(exact, rel=0.1)
    assert with_gram.relative_error(torch.zeros(8, 16), torch.zeros(8, 16)) == 0


def test_what_was_not_asked_for_is_not_there() -> None:
    inputs = InputStatistics(4, 1, CPU)
    inputs.update(torch.randn(1, 3, 4))
    assert not inputs.has_gram
    for name in ("gram", "mean", "variance", "sequence_sum", "within_variance"):
        with pytest.raises(RuntimeError, match="not collected"):
            getattr(inputs, name)
    with pytest.raises(RuntimeError, match="'gradients' were not collected"):
        GradientStatistics().result()


def test_gradients_in_half_precision_saturate_and_in_full_do_not() -> None:
    gradient = torch.full((1, 1), 0.0005)  # 0.05 after the authors' scale of 100
    for half, expected in ((True, 128.0), (False, 204.8)):
        statistics = GradientStatistics("l1", half=half)
        for _ in range(4096):
            statistics.update(gradient)
        found = statistics.result()
        assert float(found.norms) * 100 / found.scale == pytest.approx(expected, rel=1e-3)
        assert found.samples == 4096


def test_what_is_derived_is_computed_once_until_it_is_forgotten() -> None:
    inputs, calls = InputStatistics(4, 1, CPU), []
    for _ in range(3):
        assert inputs.derived("key", lambda: calls.append(1) or len(calls)) == 1
    inputs.forget()
    assert inputs.derived("key", lambda: calls.append(1) or len(calls)) == 2


def test_sequences_without_tokens_count_but_change_no_sum() -> None:
    """As an expert sees them."""
    x = torch.randn(2, 5, 4)
    with_empty = InputStatistics(4, 4, CPU, frozenset({"norms", "gram", "moments"}))
    for part in (x[:1], x[:1, :0], x[1:], x[:1, :0]):
        with_empty.update(part)
    assert (with_empty.sequences, with_empty.tokens) == (4, 10)
    flat = x.reshape(-1, 4)
    torch.testing.assert_close(with_empty.square_norm, flat.square().sum(0) / 4)
    torch.testing.assert_close(with_empty.gram, flat.T @ flat)
    torch.testing.assert_close(with_empty.mean, flat.mean(0))
    torch.testing.assert_close(with_empty.variance, flat.var(0, correction=0))
