"""The transformers engine in this process: faults, limits, the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from secateur.serve import load
from secateur.serve.app import create_app
from secateur.serve.engine import (
    EngineBusy,
    EngineStats,
    EngineUnavailable,
    Event,
    Generation,
    GenerationFault,
    GenerationRequest,
    RequestRefused,
)
from secateur.serve.sampling import SamplingParameters
from secateur.serve.transformers_engine import TransformersEngine

GREEDY = SamplingParameters(temperature=0.0)
REQUEST = GenerationRequest((5, 6, 7), GREEDY, max_tokens=4, ignore_eos=True)
POISON = 9


@pytest.fixture
def engine(tiny: Path) -> Iterator[TransformersEngine]:
    made = load(tiny, engine="transformers", threads=1)
    assert isinstance(made, TransformersEngine)
    forward = made._model.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        if POISON in kwargs["input_ids"].tolist()[0]:
            raise RuntimeError("poison")
        return forward(*args, **kwargs)

    made._model.forward = poisoned
    yield made
    made.close()
    made.close()


async def all_of(generation: Generation) -> list[Event]:
    return [event async for event in generation]


def test_a_fault_ends_one_request_only(
    engine: TransformersEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        good = engine.submit(replace(REQUEST, max_tokens=50))
        bad = engine.submit(replace(REQUEST, prompt=(POISON,)))
        with pytest.raises(GenerationFault, match="poison"):
            await all_of(bad)
        assert await all_of(bad) == []
        assert len(await all_of(good)) == 50
        assert engine.unavailable() is None

    asyncio.run(scenario())
    assert "RuntimeError: poison" in capsys.readouterr().err


def test_faults_over_http(engine: TransformersEngine) -> None:
    with TestClient(create_app(engine)) as client:
        body = {"prompt": [POISON], "max_tokens": 2}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "generation_failed"
        answer = client.post("/v1/completions", json={**body, "stream": True})
        lines = [line for line in answer.text.split("\n") if line]
        assert "generation_failed" in lines[-2]
        assert lines[-1] == "data: [DONE]"
        assert 'finished_reason="error",model_name="tiny-llama"} 2.0' in client.get("/metrics").text
        assert client.get("/health").status_code == 200
        engine.drain(0.0)
        assert client.get("/health").status_code == 503
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "server_error"


def test_a_bug_is_an_error_object(engine: TransformersEngine) -> None:
    engine.stats = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "a bug: ZeroDivisionError"


def test_a_model_without_chat_template(engine: TransformersEngine) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    template = "{{ raise_exception('roles must alternate') }}"
    with TestClient(create_app(engine)) as client:
        engine.codec.tokenizer.chat_template = template
        refused = client.post("/v1/chat/completions", json=body).json()["error"]
        assert "roles must alternate" in refused["message"]
        engine.codec.tokenizer.chat_template = None
        refused = client.post("/v1/chat/completions", json=body).json()["error"]
        assert refused["code"] == "no_chat_template"


def test_the_workers_death_is_told(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(_: Any) -> None:
        raise SystemExit("dead")

    async def scenario() -> None:
        monkeypatch.setattr(engine, "_advance", dies)
        with pytest.raises(GenerationFault, match="worker died"):
            await all_of(engine.submit(REQUEST))
        assert "dead" in str(engine.unavailable())
        with pytest.raises(EngineUnavailable):
            engine.submit(REQUEST)
        assert engine.stats() == EngineStats(0, 0)

    asyncio.run(scenario())


def test_draining_aborts_after_the_time(engine: TransformersEngine) -> None:
    async def scenario() -> None:
        generation = engine.submit(replace(REQUEST, max_tokens=None))
        assert (await anext(generation)).finish_reason is None
        engine.drain(0.1)
        events = await all_of(generation)
        assert events[-1].finish_reason == "abort"
        with pytest.raises(EngineUnavailable):
            engine.submit(REQUEST)

    asyncio.run(scenario())


def test_more_requests_than_run_at_once_wait(tiny: Path) -> None:
    engine = load(tiny, engine="transformers", threads=1)
    assert isinstance(engine, TransformersEngine)
    engine._max_running = 2

    async def scenario() -> None:
        generations = [engine.submit(REQUEST) for _ in range(5)]
        generations[4].cancel()
        results = await asyncio.gather(*map(all_of, generations[:4]))
        texts = {"".join(event.text for event in events) for events in results}
        assert len(texts) == 1
        assert engine.stats() == EngineStats(0, 0)

    asyncio.run(scenario())
    engine.close()


def test_too_many_that_wait_are_refused_until_one_leaves(tiny: Path) -> None:
    async def scenario() -> None:
        first = made.submit(replace(REQUEST, max_tokens=60))
        await anext(first)  # it runs, so what follows waits
        second = made.submit(REQUEST)
        with pytest.raises(EngineBusy, match="1 requests wait already") as busy:
            made.submit(REQUEST)
        assert busy.value.retry_after > 0
        second.cancel()
        third = made.submit(REQUEST)
        assert len(await all_of(third)) == 4
        first.cancel()

    model = load(tiny, engine="transformers", threads=1)
    assert isinstance(model, TransformersEngine)
    made = TransformersEngine(
        model._model, model.codec, model_name="tiny", threads=1, max_running=1, max_waiting=1
    )
    asyncio.run(scenario())
    made.close()
    model.close()


def test_the_context_is_the_limit(engine: TransformersEngine) -> None:
    async def scenario() -> None:
        prompt = (5,) * 4090
        events = await all_of(engine.submit(replace(REQUEST, prompt=prompt, max_tokens=None)))
        assert len(events) == 6
        assert events[-1].finish_reason == "length"
        with pytest.raises(RequestRefused) as refused:
            engine.submit(replace(REQUEST, prompt=(5,) * 4096, max_tokens=None))
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(RequestRefused, match="no tokens"):
            engine.submit(replace(REQUEST, prompt=()))

    asyncio.run(scenario())


def test_a_reader_whose_loop_is_gone_does_not_hurt(engine: TransformersEngine) -> None:
    async def abandon() -> Generation:
        return engine.submit(replace(REQUEST, max_tokens=None))

    generation = asyncio.run(abandon())
    for _ in range(500):
        if generation.cancelled and engine.stats() == EngineStats(0, 0):
            return
        torch.randn(10000).sum()
    asyncio.run(asyncio.sleep(1))
    assert generation.cancelled
