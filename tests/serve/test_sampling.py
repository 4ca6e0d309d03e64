"""The sampling functions against plain loops."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.serve.sampling import (
    SamplingParameters,
    adjusted,
    distribution,
    draw,
    logprobs,
    sample,
)

logit_lists = st.lists(
    st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40
)


def plain_distribution(logits: list[float], p: SamplingParameters) -> dict[int, float]:
    weights = [math.exp((one - max(logits)) / p.temperature) for one in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] >= p.min_p]
    if p.top_k:
        order = order[: p.top_k]
    mass, reached, kept = math.fsum(weights[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token]
        assume(p.top_p == 1 or abs(reached / mass - p.top_p) > 1e-9)
        if p.top_p < 1 and reached >= p.top_p * mass:
            break
    total = math.fsum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@given(
    logit_lists,
    st.floats(0.1, 2),
    st.floats(0.01, 1) | st.just(1.0),
    st.integers(0, 45),
    st.floats(0, 1) | st.just(0.0),
)
def test_distribution(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    p = SamplingParameters(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    expected = plain_distribution(logits, p)
    ids, probabilities = distribution(np.array(logits), p)
    got = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    assert got.keys() == expected.keys()
    assert all(got[token] == pytest.approx(expected[token]) for token in got)


@given(st.data(), logit_lists)
def test_penalties(data: st.DataObject, logits: list[float]) -> None:
    tokens = st.lists(st.integers(0, len(logits) - 1), max_size=10)
    prompt, output = data.draw(tokens), data.draw(tokens)
    bias = data.draw(st.dictionaries(st.integers(0, len(logits) - 1), st.floats(-100, 100)))
    penalty = st.floats(-2, 2)
    p = SamplingParameters(
        repetition_penalty=data.draw(st.floats(0.1, 3)),
        presence_penalty=data.draw(penalty),
        frequency_penalty=data.draw(penalty),
        logit_bias=tuple(bias.items()),
    )
    given_logits = np.array(logits, dtype=np.float32)
    before = given_logits.copy()
    scores = adjusted(given_logits, p, prompt, output)
    assert np.array_equal(given_logits, before)
    counts = Counter(output)
    for token, logit in enumerate(before.tolist()):
        expected = logit + bias.get(token, 0.0)
        if token in prompt or token in output:
            if expected > 0:
                expected /= p.repetition_penalty
            else:
                expected *= p.repetition_penalty
        if counts[token]:
            expected -= p.presence_penalty + counts[token] * p.frequency_penalty
        assert scores[token] == pytest.approx(expected)


@given(logit_lists, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_sum(logits: list[float], uniform: float) -> None:
    ids, probabilities = distribution(np.array(logits), SamplingParameters())
    token = draw(ids, probabilities, uniform)
    before = math.fsum(probabilities[:token])
    assert before - 1e-9 <= uniform <= before + probabilities[token] + 1e-9
    assert probabilities[token] > 0


def test_draw_never_takes_what_is_impossible() -> None:
    ids, last = np.arange(3), np.nextafter(1.0, 0.0)
    assert draw(ids, np.array([0.0, 1.0, 0.0]), last) == 1
    assert draw(ids, np.array([0.0, 1.0, 0.0]), 0.0) == 1


@given(logit_lists)
def test_greedy_is_argmax_and_draws_nothing(logits: list[float]) -> None:
    generator = np.random.default_rng(0)
    state = generator.bit_generator.state
    token = sample(np.array(logits), SamplingParameters(temperature=0.0), [], [], generator)
    assert token == max(range(len(logits)), key=lambda one: logits[one])
    assert generator.bit_generator.state == state


def test_frequencies_follow_the_probabilities() -> None:
    generator = np.random.default_rng(7)
    logits = np.log([0.5, 0.3, 0.2])
    drawn = Counter(sample(logits, SamplingParameters(), [], [], generator) for _ in range(20000))
    assert [drawn[token] / 20000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


def test_bias_forces_and_forbids() -> None:
    def greedy(**fields: Any) -> int:
        p = SamplingParameters(temperature=0.0, **fields)
        return sample(np.array([1.0, 2.0, 3.0]), p, [], [], np.random.default_rng())

    assert greedy(logit_bias=((0, 100.0),)) == 0
    assert greedy(logit_bias=((2, -100.0),)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_model_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="not numbers"):
        sample(np.array([0.0, bad]), SamplingParameters(), [], [], np.random.default_rng())


@given(logit_lists, st.integers(0, 45), st.data())
def test_logprobs(logits: list[float], count: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    total = math.log(math.fsum(math.exp(one) for one in logits))
    got = logprobs(np.array(logits), token, count)
    assert got.token_id == token
    assert got.logprob == pytest.approx(logits[token] - total, abs=1e-9)
    order = sorted(range(len(logits)), key=lambda one: (-logits[one], one))[:count]
    assert [logits[one] for one, _ in got.top] == [logits[one] for one in order]
    assert [value for _, value in got.top] == pytest.approx(
        [logits[one] - total for one in order], abs=1e-9
    )
