"""The native sampler against the numpy functions.

Logits, biases and penalties come from grids, so that scores are either equal or clearly apart and
the ranking does not hang on the last bit of an exponential. The sums are added up in another order
than numpy's: where a uniform number or top_p falls on a boundary, either side of it is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile import _kernels
from secateur.serve import sampling as plain
from secateur.serve.native import sampling as native
from secateur.serve.sampling import SamplingParameters

Floats = np.ndarray[Any, np.dtype[np.float32]]
ROUNDING = 1e-12


def grid(low: int, high: int, steps: int) -> st.SearchStrategy[float]:
    return st.integers(low * steps, high * steps).map(lambda one: one / steps)


seeds = st.integers(0, 2**32)
widths = st.sampled_from([1, 2, 5, 15, 16, 17, 40, 100])
parameters = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 1e-6, 0.01, 0.25, 0.7, 1.0, 1.5]),
    top_p=st.sampled_from([1.0, 1e-9]) | st.floats(0.01, 0.99),
    top_k=st.just(0) | st.integers(0, 110),
    min_p=st.just(0.0) | st.floats(0.001, 1.0),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.25, 2.0]),
    presence_penalty=st.just(0.0) | grid(-2, 2, 8),
    frequency_penalty=st.just(0.0) | grid(-2, 2, 8),
)
uniforms = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, np.nextafter(1.0, 0.0)])


def make_rows(seed: int, count: int, width: int) -> Floats:
    """Logits with ties, far apart or close, and a few that are impossible."""
    random = np.random.default_rng(seed)
    most = random.choice([0, 2, 40, 320], size=(count, 1))
    logits = np.round(random.uniform(-most, most, (count, width))) / 16
    logits[random.random((count, width)) < random.choice([0.0, 0.3])] = -np.inf
    logits[:, random.integers(width)] = 1.0
    return logits.astype(np.float32)


def allowed(
    row: Floats, p: SamplingParameters, prompt: list[int], output: list[int], uniform: float
) -> set[int]:
    """The tokens that the reference draws for this number, give or take the rounding of sums."""
    scores = plain.adjusted(row, p, prompt, output)
    if p.temperature < plain.GREEDY_BELOW:
        return {int(scores.argmax())}
    found = set()
    for nudge in (0.0, -ROUNDING, ROUNDING):
        near = SamplingParameters(
            temperature=p.temperature,
            top_p=p.top_p if p.top_p == 1 else min(max(p.top_p + nudge, 1e-15), 1 - 1e-15),
            top_k=p.top_k,
            min_p=min(p.min_p * (1 + nudge), 1.0),
        )
        ids, probabilities = plain.distribution(scores, near)
        for moved in (uniform - ROUNDING, uniform, uniform + ROUNDING):
            found.add(plain.draw(ids, probabilities, min(max(moved, 0.0), np.nextafter(1.0, 0.0))))
    return found


@given(st.data())
def test_tokens_are_those_of_the_reference(data: st.DataObject) -> None:
    """Several sequences with their own parameters, in any order of rows, token after token."""
    width = data.draw(widths)
    token = st.integers(0, width - 1)
    count = data.draw(st.integers(1, 3))
    chosen = [
        SamplingParameters(
            **{
                **{name: getattr(p, name) for name in p.__dataclass_fields__},
                "logit_bias": tuple(
                    data.draw(st.lists(st.tuples(token, grid(-9, 9, 8)), max_size=3))
                ),
            }
        )
        for p in data.draw(st.lists(parameters, min_size=count, max_size=count))
    ]
    prompts = [data.draw(st.lists(token, max_size=5)) for _ in range(count)]
    outputs: list[list[int]] = [[] for _ in range(count)]
    samplers = [native.make_sampler(*one) for one in zip(chosen, prompts, strict=True)]
    for _ in range(data.draw(st.integers(1, 4))):
        logits = make_rows(data.draw(seeds), count, width)
        order = data.draw(st.permutations(range(count)))
        numbers = [data.draw(uniforms) for _ in range(count)]
        got = native.sample([samplers[at] for at in order], logits, order, numbers)
        for at, number, token_id in zip(order, numbers, got, strict=True):
            expected = allowed(logits[at], chosen[at], prompts[at], outputs[at], number)
            assert token_id in expected
            outputs[at].append(token_id)


@given(st.data())
def test_logprobs_are_those_of_the_reference(data: st.DataObject) -> None:
    width = data.draw(widths)
    logits = make_rows(data.draw(seeds), 3, width)
    asked = data.draw(
        st.lists(st.tuples(*map(st.integers, (0, 0, 0), (2, width - 1, width + 2))), max_size=6)
    )
    for (row, token, count), got in zip(asked, native.logprobs(logits, asked), strict=True):
        expected = plain.logprobs(logits[row], token, count)
        assert got.token_id == token
        assert got.logprob == pytest.approx(expected.logprob, abs=ROUNDING)
        assert [one for one, _ in got.top] == [one for one, _ in expected.top]
        ours, theirs = ([value for _, value in one.top] for one in (got, expected))
        assert ours == pytest.approx(theirs, abs=ROUNDING)


@pytest.mark.parametrize(
    "p",
    [
        SamplingParameters(temperature=0.0),
        SamplingParameters(),
        SamplingParameters(top_p=0.95),
        SamplingParameters(top_p=0.9, min_p=0.01, temperature=0.6),
        SamplingParameters(top_k=50, top_p=0.9),
        SamplingParameters(top_k=5000),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
def test_a_real_vocabulary(p: SamplingParameters, spread: float) -> None:
    random = np.random.default_rng(3)
    logits = (np.round(random.normal(size=(4, 49152)) * 512) * spread / 512).astype(np.float32)
    numbers = random.random(4).tolist()
    got = native.sample([native.make_sampler(p, ())] * 4, logits, range(4), numbers)
    for row, number, token in zip(logits, numbers, got, strict=True):
        assert token in allowed(row, p, [], [], number)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 39])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_only_the_broken_row_is_refused(bad: float, at: int, penalty: float) -> None:
    logits = np.zeros((3, 40), dtype=np.float32)
    logits[:, 7] = 1.0
    logits[1, at] = bad
    p = SamplingParameters(temperature=0.0, repetition_penalty=penalty)
    samplers = [native.make_sampler(p, (3,)) for _ in range(3)]
    assert native.sample(samplers, logits, range(3), [0.0] * 3) == [7, native.REFUSED, 7]
    logits[:] = -np.inf
    assert native.sample(samplers, logits, range(3), [0.0] * 3) == [native.REFUSED] * 3


def test_the_number_of_threads_changes_nothing() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(size=(16, 1000)).astype(np.float32) * 3
    numbers = random.random(16).tolist()
    before, results = _kernels.threads(), []
    try:
        for threads in (1, 2, 3):
            _kernels.set_threads(threads, False)
            samplers = [native.make_sampler(SamplingParameters(top_p=0.9), ()) for _ in range(16)]
            tokens = native.sample(samplers, logits, range(16), numbers)
            scores = native.logprobs(logits, [(row, one, 5) for row, one in enumerate(tokens)])
            results.append((tokens, scores))
    finally:
        _kernels.set_threads(before, False)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("top_k", [2**31, 2**63, 10**30])
def test_a_top_k_beyond_every_integer_of_c_keeps_all(top_k: int) -> None:
    logits = np.random.default_rng(3).standard_normal((1, 50)).astype(np.float32)
    for number in (0.01, 0.5, 0.99):
        got, all_ = (
            native.sample(
                [native.make_sampler(SamplingParameters(top_k=k), ())], logits, [0], [number]
            )
            for k in (top_k, 0)
        )
        assert got == all_


def test_impossible_calls_are_refused() -> None:
    logits = np.zeros((2, 5), dtype=np.float32)
    sampler = native.make_sampler(SamplingParameters(), ())
    foreign = native.make_sampler(SamplingParameters(logit_bias=((5, 1.0),)), ())
    for call in (
        lambda: native.sample([sampler], logits, [2], [0.5]),
        lambda: native.sample([sampler], logits, [-1], [0.5]),
        lambda: native.sample([sampler], logits, [0, 1], [0.5, 0.5]),
        lambda: native.sample([sampler], logits, [0], []),
        lambda: native.sample([foreign], logits, [0], [0.5]),
        lambda: native.sample([sampler], logits[:, :0], [0], [0.5]),
        lambda: native.make_sampler(SamplingParameters(logit_bias=((-1, 1.0),)), ()),
        lambda: native.logprobs(logits, [(0, 5, 1)]),
        lambda: native.logprobs(logits, [(0, -1, 1)]),
        lambda: native.logprobs(logits, [(2, 1, 1)]),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()
