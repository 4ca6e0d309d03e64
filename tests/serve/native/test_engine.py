"""The native engine on a model that reads its own history through the page tables."""

from __future__ import annotations

import asyncio
import codecs
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.serve import sampling
from secateur.serve.engine import (
    EngineBusy,
    EngineStats,
    EngineUnavailable,
    Event,
    GenerationFault,
    GenerationRequest,
    RequestRefused,
)
from secateur.serve.native.engine import NativeEngine
from secateur.serve.native.step import Batch
from secateur.serve.sampling import SamplingParameters
from secateur.serve.text import TextCodec

LETTERS = [chr(97 + n) for n in range(26)] + ["é", "中", "🙂", " "]
PIECES = [letter.encode() for letter in LETTERS[:26]] + [
    b"\xc3",
    b"\xa9",
    b"\xe4",
    b"\xb8",
    b"\xad",
]
VOCABULARY = len(PIECES) + 2
EOS, SPECIAL = VOCABULARY - 2, VOCABULARY - 1
POISON = 25
GREEDY = SamplingParameters(temperature=0.0)
REQUEST = GenerationRequest((5, 6, 7), GREEDY, max_tokens=6, ignore_eos=True)


class Letters(TextCodec):
    """A vocabulary of letters and of parts of characters."""

    def __init__(self) -> None:
        self._bytes = [*PIECES, b"<eos>", b"<special>"]
        self.special = frozenset({EOS, SPECIAL})
        self.eos_token_id = EOS


def logits_after(history: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits (vocabulary,) that depend on every token and on the order."""
    seed = zlib.crc32(np.asarray(history, dtype="<i4").tobytes())
    mixed = np.arange(1, VOCABULARY + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(13))) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(40)) % np.uint64(1024)).astype(np.float32) / np.float32(128)


class Pages:
    """Keeps the tokens themselves in its pages and answers from what it finds there."""

    vocabulary_size = VOCABULARY
    eos_token_ids = frozenset({EOS})
    description = "letters"

    def __init__(self, pages: int = 64, page_tokens: int = 4, max_length: int = 96) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.max_length = max_length
        self.cache = np.full((pages, page_tokens), -1)
        self.batches: list[Batch] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = 0
        self.before: Callable[[Batch], None] = lambda batch: None

    def step(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.gate.wait()
        self.batches.append(batch)
        self.before(batch)
        answers, size = [], self.page_tokens
        for s, (start, end) in enumerate(pairwise(batch.starts)):
            at = int(batch.positions[s])
            table = batch.tables[s]
            for place, token in enumerate(batch.tokens[start:end], start=at):
                self.cache[table[place // size], place % size] = token
            history = self.cache[table[: -(-(at + int(end - start)) // size)]].ravel()
            for row in batch.wanted[(batch.wanted >= start) & (batch.wanted < end)]:
                answers.append(logits_after(history[: at + int(row - start) + 1]))
        return np.array(answers, dtype=np.float32).reshape(-1, VOCABULARY)

    def close(self) -> None:
        self.closed += 1


def reference(request: GenerationRequest, limit: int) -> tuple[list[int], str, str]:
    """Tokens, text and finish reason of a request alone, with no cache and no stream."""
    random = np.random.default_rng(request.sampling.seed)
    room = limit - len(request.prompt)
    room = room if request.max_tokens is None else min(room, request.max_tokens)
    ends = request.stop_token_ids | (set() if request.ignore_eos else {EOS})
    codec, output = Letters(), list[int]()
    while len(output) < room:
        history = [*request.prompt, *output]
        logits = logits_after(history)
        output.append(sampling.sample(logits, request.sampling, request.prompt, output, random))
        over = output[-1] in ends
        shown = output[:-1] if over else output
        text = b"".join(codec.token_bytes(one) for one in shown if one not in codec.special)
        final = over or len(output) == room
        seen = text.decode(errors="replace") if final else decoded_so_far(text)
        cuts = [seen.find(stop) for stop in request.stop if stop in seen]
        if cuts:
            return output, seen[: min(cuts)], "stop"
        if over:
            return output, seen, "stop"
    return output, seen if output else "", "length"


def decoded_so_far(raw: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(raw)


@contextmanager
def engine_on(model: Pages, **options: Any) -> Iterator[NativeEngine]:
    engine = NativeEngine(model, Letters(), model_name="letters", threads=1, **options)
    try:
        yield engine
    finally:
        model.gate.set()
        engine.close()
        engine.close()
        assert model.closed == 1
        engine._pool.check([])
        assert engine._pool.used == 0


async def all_of(generation: Any) -> list[Event]:
    return [event async for event in generation]


def outcome(events: list[Event]) -> tuple[list[int], str, str | None]:
    tokens = [event.token_id for event in events if event.token_id is not None]
    return tokens, "".join(event.text for event in events), events[-1].finish_reason


def run_all(engine: NativeEngine, requests: Sequence[GenerationRequest]) -> list[list[Event]]:
    async def scenario() -> list[list[Event]]:
        with engine._changed:  # so that the worker finds them together
            generations = [engine.submit(request) for request in requests]
        return await asyncio.gather(*map(all_of, generations))

    return asyncio.run(scenario())


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
        assert (batch.starts[1:] - batch.starts[:-1] > 1).sum() <= budget
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
