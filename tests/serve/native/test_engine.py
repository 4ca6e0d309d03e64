"""The native engine: whatever runs beside a request, its result is that of it alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.serve import sampling
from secateur.serve.engine import Event, GenerationRequest
from secateur.serve.native.engine import NativeEngine
from secateur.serve.sampling import SamplingParameters
from tests.serve.native.paged_model import (
    POISON,
    REQUEST,
    Pages,
    all_of,
    engine_on,
    logits_after,
    outcome,
    reference,
    run_all,
)

tokens = st.integers(0, POISON - 1)
# Prompts that share beginnings.
prompts = st.builds(
    lambda base, keep, rest: (*base[:keep], *rest),
    st.sampled_from([(1, 2, 3) * 8, (1, 2, 3, 1, 2, 3, 1, 9) * 3]),
    st.integers(0, 24),
    st.lists(tokens, min_size=1, max_size=8),
)
samplings = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (4, -100.0))]),
    seed=st.integers(0, 2**32),
)
requests = st.builds(
    GenerationRequest,
    prompt=prompts,
    sampling=samplings,
    max_tokens=st.none() | st.integers(0, 30),
    stop=st.sampled_from([(), ("a",), ("bc", "d"), ("é", "xy")]),
    stop_token_ids=st.sampled_from([frozenset(), frozenset({7, 8})]),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 3),
    prompt_logprobs=st.none() | st.none() | st.integers(0, 3),
    client=st.sampled_from(["", "a", "b"]),
)


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(requests, min_size=1, max_size=12),
    pages=st.integers(24, 60),
    max_running=st.integers(1, 12),
    budget=st.integers(2, 40),
)
def test_each_result_is_that_of_the_request_alone(
    wanted: list[GenerationRequest], pages: int, max_running: int, budget: int
) -> None:
    model = Pages(pages)
    with engine_on(model, max_running=max_running, token_budget=budget) as engine:
        results = run_all(engine, wanted)
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages, stats.pages_used) == (0, 0, pages, 0)
    assert 0 <= stats.prefix_hits <= stats.prefix_queries
    for request, events in zip(wanted, results, strict=True):
        assert outcome(events) == reference(request, engine.max_length)
        check_logprobs(request, events)
    for batch in model.batches:
        assert len(batch.tokens) <= budget + max_running
        assert len(batch.positions) <= max_running


def check_logprobs(request: GenerationRequest, events: list[Event]) -> None:
    history = list(request.prompt)
    for event in events:
        if event.token_id is None or request.logprobs is None:
            assert event.logprobs is None
        else:
            same(event.logprobs, history, event.token_id, request.logprobs)
            history.append(event.token_id)
    assert all(event.prompt_logprobs is None for event in events[1:])
    scores = events[0].prompt_logprobs
    if request.prompt_logprobs is None:
        assert scores is None
        return
    assert scores is not None
    assert len(scores) == len(request.prompt)
    assert scores[0] is None
    for at in range(1, len(scores)):
        same(scores[at], request.prompt[:at], request.prompt[at], request.prompt_logprobs)


def same(got: Any, history: Sequence[int], token: int, count: int) -> None:
    expected = sampling.logprobs(logits_after(history), token, count)
    assert got.token_id == token
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-9)
    assert [one for one, _ in got.top] == [one for one, _ in expected.top]
    assert [one for _, one in got.top] == pytest.approx([one for _, one in expected.top], abs=1e-9)


def test_few_pages_send_requests_back_and_change_nothing() -> None:
    wanted = [
        replace(
            REQUEST,
            prompt=(one, 2, 3),
            max_tokens=40,
            client=str(one % 2),
            sampling=SamplingParameters(seed=one, frequency_penalty=0.1),
        )
        for one in range(8)
    ]
    model = Pages(pages=24)
    with engine_on(model) as engine:
        results = run_all(engine, wanted)
        assert engine.stats().preemptions > 0
    for request, events in zip(wanted, results, strict=True):
        assert outcome(events) == reference(request, 96)


def test_choices_of_one_prompt_compute_it_once() -> None:
    prompt = tuple(one % 20 for one in range(41))
    wanted = [
        replace(REQUEST, prompt=prompt, sampling=SamplingParameters(seed=one), max_tokens=3)
        for one in range(6)
    ]
    model = Pages()
    with engine_on(model, token_budget=16) as engine:
        results = run_all(engine, wanted)
        assert engine.stats().prefix_hits == 5 * 40
        alone = len(model.batches)
        again = run_all(engine, [replace(wanted[0], prompt_logprobs=1)])
        assert sum(len(batch.tokens) for batch in model.batches[alone:]) == 41 + 2  # all anew
        assert outcome(again[0]) == outcome(results[0])
    computed = sum(len(batch.tokens) for batch in model.batches[:alone])
    assert computed == 40 + 6 * 3  # the last prompt token and two of the output are each one's own
    for request, events in zip(wanted, results, strict=True):
        assert outcome(events) == reference(request, 96)


def test_cancelled_requests_leave_at_the_next_step() -> None:
    model = Pages(max_length=4000, pages=1000)

    async def scenario(engine: NativeEngine) -> None:
        endless = replace(REQUEST, max_tokens=None)
        running, beside = engine.submit(endless), engine.submit(replace(endless, max_tokens=30))
        queued = engine.submit(endless)
        await anext(running)
        running.cancel()
        queued.cancel()
        assert outcome(await all_of(beside)) == reference(beside.request, 4000)
        after = engine.submit(REQUEST)
        assert outcome(await all_of(after)) == reference(REQUEST, 4000)
        assert engine.stats().running == engine.stats().waiting == engine.stats().pages_used == 0

    with engine_on(model, max_running=2) as engine:
        asyncio.run(scenario(engine))


@settings(max_examples=25, deadline=None)
@given(
    wanted=st.lists(st.tuples(requests, st.integers(0, 12)), min_size=2, max_size=10),
    pages=st.integers(24, 40),
)
def test_requests_come_and_go(wanted: list[tuple[GenerationRequest, int]], pages: int) -> None:
    """A reader who leaves after some events hurts neither the others nor the pages."""

    async def read(engine: NativeEngine, request: GenerationRequest, patience: int) -> None:
        generation = engine.submit(request)
        expected, got = reference(request, engine.max_length), list[int]()
        async for event in generation:
            if event.token_id is not None:
                got.append(event.token_id)
            if event.finish_reason is not None:
                assert (got, event.finish_reason) == (expected[0], expected[2])
            elif len(got) == patience:
                generation.cancel()
                break
        assert got == expected[0][: len(got)]

    async def scenario(engine: NativeEngine) -> None:
        await asyncio.gather(*(read(engine, *one) for one in wanted))
        await all_of(engine.submit(REQUEST))
        assert engine.stats().pages_used == 0

    with engine_on(Pages(pages), max_running=5, token_budget=8) as engine:
        asyncio.run(scenario(engine))
