"""The native engine: faults, limits, the end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secateur.serve.engine import (
    EngineBusy,
    EngineStats,
    EngineUnavailable,
    GenerationFault,
    RequestRefused,
)
from secateur.serve.native.engine import NativeEngine
from secateur.serve.native.step import Batch
from secateur.serve.sampling import SamplingParameters
from tests.serve.native.paged_model import (
    POISON,
    REQUEST,
    Pages,
    all_of,
    engine_on,
    outcome,
    reference,
    run_all,
)


def test_a_fault_ends_one_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    model = Pages()

    def poisoned(batch: Batch) -> None:
        if POISON in batch.tokens:
            raise RuntimeError("poison")

    model.before = poisoned
    good = [
        replace(
            REQUEST,
            prompt=(one, 6),
            sampling=SamplingParameters(seed=one, logit_bias=((POISON, -100.0),)),
            max_tokens=20,
        )
        for one in range(3)
    ]

    async def scenario(engine: NativeEngine) -> None:
        with engine._changed:
            generations = [engine.submit(one) for one in good]
            bad = engine.submit(replace(REQUEST, prompt=(5, POISON)))
        with pytest.raises(GenerationFault, match="poison"):
            await all_of(bad)
        assert await all_of(bad) == []
        for one in generations:
            assert outcome(await all_of(one)) == reference(one.request, 96)
        assert engine.unavailable() is None

    with engine_on(model) as engine:
        asyncio.run(scenario(engine))
    assert capsys.readouterr().err.count("RuntimeError: poison") == 1


@pytest.mark.parametrize("scored", [None, 0])
def test_logits_that_are_not_numbers_end_one_request_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scored: int | None
) -> None:
    model, step = Pages(), Pages.step

    def broken(batch: Batch) -> Any:
        logits = step(model, batch)
        ends = batch.tokens[batch.wanted] == POISON
        logits[ends, 4] = np.nan
        return logits

    monkeypatch.setattr(model, "step", broken)
    prompt = (5, POISON) if scored is None else (5, POISON, 6)

    async def scenario(engine: NativeEngine) -> None:
        with engine._changed:
            bad = engine.submit(replace(REQUEST, prompt=prompt, prompt_logprobs=scored))
            good = engine.submit(REQUEST)
        with pytest.raises(GenerationFault, match="not numbers"):
            await all_of(bad)
        assert outcome(await all_of(good)) == reference(REQUEST, 96)

    with engine_on(model) as engine:
        asyncio.run(scenario(engine))
    assert "not numbers" in capsys.readouterr().err


def test_the_workers_death_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = Pages()

    def dies(_: Batch) -> None:
        raise SystemExit("dead")

    model.before = dies

    async def scenario(engine: NativeEngine) -> None:
        with engine._changed:
            generations = [engine.submit(REQUEST) for _ in range(3)]
        for generation in generations:
            with pytest.raises(GenerationFault, match="worker died"):
                await all_of(generation)
        assert "dead" in str(engine.unavailable())
        with pytest.raises(EngineUnavailable):
            engine.submit(REQUEST)
        assert engine.stats() == EngineStats(0, 0, pages=64, prefix_queries=9)

    with engine_on(model) as engine:
        asyncio.run(scenario(engine))
    assert "dead" in capsys.readouterr().err


def test_draining_lets_the_short_ones_end_and_aborts_the_rest() -> None:
    model = Pages(pages=100_000, max_length=400_000)

    async def scenario(engine: NativeEngine) -> None:
        with engine._changed:
            short = engine.submit(REQUEST)
            long, queued = (engine.submit(replace(REQUEST, max_tokens=None)) for _ in range(2))
        await anext(long)
        engine.drain(1000.0)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            engine.submit(REQUEST)
        assert outcome(await all_of(short)) == reference(REQUEST, 96)
        engine.drain(0.0)
        for one in (long, queued):
            assert (await all_of(one))[-1].finish_reason == "abort"
        assert engine.stats().pages_used == 0

    with engine_on(model, max_running=2) as engine:
        asyncio.run(scenario(engine))


def test_deadlines_end_waiting_and_running_requests() -> None:
    model = Pages(pages=100_000, max_length=400_000)

    async def scenario(engine: NativeEngine) -> None:
        endless = replace(REQUEST, max_tokens=None)
        with engine._changed:
            late = [engine.submit(endless) for _ in range(2)]
        for one in late:
            with pytest.raises(GenerationFault, match=r"longer than 0\.3 s"):
                await all_of(one)
        engine._scheduler.deadline = 1000.0
        assert outcome(await all_of(engine.submit(REQUEST))) == reference(REQUEST, 96)

    with engine_on(model, max_running=1, deadline=0.3) as engine:
        asyncio.run(scenario(engine))


def test_too_many_waiting_requests_are_sent_away() -> None:
    model = Pages()
    model.gate.clear()

    async def scenario(engine: NativeEngine) -> None:
        with engine._changed:
            accepted = [engine.submit(REQUEST) for _ in range(3)]
            with pytest.raises(EngineBusy) as busy:
                engine.submit(REQUEST)
        assert 1.0 <= busy.value.retry_after <= 60.0
        model.gate.set()
        for one in accepted:
            await all_of(one)
        await all_of(engine.submit(REQUEST))

    with engine_on(model, max_running=1, max_waiting=3) as engine:
        asyncio.run(scenario(engine))


def test_what_can_never_fit_is_refused() -> None:
    async def scenario(engine: NativeEngine) -> None:
        assert engine.max_length == 40  # ten pages of four tokens
        for request in (
            replace(REQUEST, prompt=(1,) * 40),
            replace(REQUEST, max_tokens=38),
        ):
            with pytest.raises(RequestRefused) as refused:
                engine.submit(request)
            assert refused.value.code == "context_length_exceeded"
        whole = replace(REQUEST, max_tokens=None)
        assert outcome(await all_of(engine.submit(whole))) == reference(whole, 40)

    with engine_on(Pages(pages=10)) as engine:
        asyncio.run(scenario(engine))


def test_a_reader_whose_loop_is_gone_does_not_hurt() -> None:
    model = Pages(pages=100_000, max_length=400_000)

    async def abandon(engine: NativeEngine) -> Any:
        return engine.submit(replace(REQUEST, max_tokens=None))

    with engine_on(model) as engine:
        generation = asyncio.run(abandon(engine))
        assert outcome(run_all(engine, [REQUEST])[0]) == reference(REQUEST, 96)
        while engine.stats().running:  # the suite's time limit ends this
            run_all(engine, [REQUEST])
        assert generation.cancelled
