"""A model that keeps the tokens in its pages, and what a request must give by plain means."""

from __future__ import annotations

import asyncio
import codecs
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from secateur.serve import sampling
from secateur.serve.engine import Event, GenerationRequest
from secateur.serve.native.engine import NativeEngine
from secateur.serve.native.step import Batch
from secateur.serve.sampling import SamplingParameters
from secateur.serve.text import TextCodec

PIECES = [chr(97 + place).encode() for place in range(26)] + [
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
        self.special = frozenset({EOS, SPECIAL})
        self.eos_token_id = EOS

    def token_bytes(self, token: int) -> bytes:
        return [*PIECES, b"<eos>", b"<special>"][token]


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
    engine = NativeEngine(model, Letters(), model_name="letters", **options)
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
