"""Requests to an OpenAI endpoint under a load, and when each piece of each answer came.

Measured as `vllm bench serve` does: a request begins when it is about to be sent (waiting for one's
turn under a bound on concurrency does not count), and every streamed event with a choice in it is
an arrival, whatever text it holds. No piece of an answer is looked at twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import httpx
import numpy as np

from secateur.bench.prompts import Prompt
from secateur.errors import EnvironmentFault, UsageError
from secateur.progress import Tick, no_tick

Api = Literal["completions", "chat"]
Counter = Callable[[str], int]

_PATIENCE = httpx.Timeout(600.0, connect=30.0)  # seconds without a sign of life


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request; times in seconds of one clock.

    Attributes:
        start: when it was about to be sent.
        arrivals: when each event with a choice came.
        prompt_tokens: as the server counted them, else as we did.
        output_tokens: likewise.
        counted: who counted the output: the server ("usage"), "tokenizer", or nobody ("events":
            one an event).
        error: why there is no answer; None if there is one.
    """

    start: float
    arrivals: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    counted: str = "usage"
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first event."""
        return self.arrivals[0] - self.start

    @property
    def latency(self) -> float:
        """Seconds to the last event."""
        return self.arrivals[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first event; None of an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Seconds between neighbouring events."""
        return [after - before for before, after in pairwise(self.arrivals)]


@dataclass(frozen=True)
class Target:
    """An endpoint and how it is asked.

    Attributes:
        url: without ``/v1``.
        model: the name to ask for.
        api: which of its two APIs.
        ignore_eos: ask for answers of the full length.
        count: tokens of a text, where the server does not count them.
    """

    url: str
    model: str
    api: Api = "completions"
    ignore_eos: bool = True
    count: Counter | None = None

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request for an answer."""
        content: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        if self.ignore_eos:
            content["ignore_eos"] = True
        if self.api == "chat":
            message = {"role": "user", "content": prompt.text}
            return content | {"messages": [message], "max_completion_tokens": prompt.new_tokens}
        return content | {"prompt": prompt.text, "max_tokens": prompt.new_tokens}

    @property
    def path(self) -> str:
        """Where requests go."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"


def open_client(url: str) -> httpx.AsyncClient:
    """A client with as many connections as are needed; ``OPENAI_API_KEY`` is its key."""
    key = os.environ.get("OPENAI_API_KEY")
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=_PATIENCE,
        trust_env=False,  # a proxy between us and the server would be measured, too
    )


async def served_model(client: httpx.AsyncClient) -> str:
    """The first model that an endpoint offers.

    Raises:
        EnvironmentFault: nobody answers, or not as an OpenAI endpoint does.
        UsageError: it wants a key.
    """
    try:
        answer = await client.get("/v1/models")
    except httpx.HTTPError as fault:
        raise EnvironmentFault(
            f"nobody answers at {client.base_url}: {fault or type(fault).__name__}",
            "start the server, or correct the address",
        ) from fault
    if answer.status_code in (401, 403):
        raise UsageError(
            f"{client.base_url} wants an API key", "set OPENAI_API_KEY in the environment"
        )
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as fault:
        raise EnvironmentFault(
            f"{client.base_url}/v1/models answers {answer.status_code} and names no model",
            "give the address of an OpenAI-compatible server, without /v1, or --model",
        ) from fault


async def ask(client: httpx.AsyncClient, target: Target, prompt: Prompt) -> Reply:
    """Send one request and note when its answer comes; failing is a `Reply`, too."""
    arrivals: list[float] = []
    text: list[str] = []
    usage: dict[str, Any] = {}
    body = json.dumps(target.body(prompt))
    start = time.perf_counter()
    try:
        async with client.stream(
            "POST", target.path, content=body, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status_code != 200:
                return _failed(start, prompt, await _refusal(response))
            async for event in _events(response):
                if "error" in event:
                    return _failed(start, prompt, str(event["error"])[:200])
                if choices := event.get("choices"):
                    arrivals.append(time.perf_counter())
                    text.append(_text_of(choices[0]))
                usage = event.get("usage") or usage
    except (httpx.HTTPError, ValueError) as fault:
        return _failed(start, prompt, f"{type(fault).__name__}: {fault}")
    if not arrivals:
        return _failed(start, prompt, "the answer holds no choice")
    output, counted = usage.get("completion_tokens"), "usage"
    if not output and target.count:
        output, counted = target.count("".join(text)), "tokenizer"
    if not output:
        output, counted = len(arrivals), "events"
    read = usage.get("prompt_tokens") or prompt.tokens
    return Reply(start, tuple(arrivals), read, output, counted)


async def drive(
    client: httpx.AsyncClient,
    target: Target,
    prompts: Sequence[Prompt],
    *,
    concurrency: int | None = None,
    arrivals: Sequence[float] | None = None,
    progress: Tick = no_tick,
) -> tuple[list[Reply], float]:
    """Send all requests.

    Args:
        client: from `open_client`.
        target: where to.
        prompts: one for each request.
        concurrency: requests under way at once at most; None: no bound.
        arrivals: seconds after the beginning at which each comes; None: all at once.
        progress: called with (answers, requests).

    Returns:
        The replies, in the order of the prompts, and the seconds from the beginning to the end of
        the last one.
    """
    turn = asyncio.Semaphore(concurrency or len(prompts))
    done = 0

    async def one(prompt: Prompt, due: float) -> Reply:
        nonlocal done
        if due > 0:
            await asyncio.sleep(begun + due - time.perf_counter())
        async with turn:
            reply = await ask(client, target, prompt)
        done += 1
        progress(done, len(prompts))
        return reply

    begun = time.perf_counter()
    due = arrivals if arrivals is not None else [0.0] * len(prompts)
    replies = await asyncio.gather(*(one(*both) for both in zip(prompts, due, strict=True)))
    return list(replies), time.perf_counter() - begun


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests come, as `vllm bench serve` draws them.

    The gaps are gamma distributed with shape ``burstiness`` and mean 1/``rate`` (1: exponential, a
    Poisson process; less: in bursts), then stretched so that the last comes at count/rate.
    """
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    return [float(time) for time in times * (count / rate / times[-1])]


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, as it comes.

    Not by httpx's lines: those also end at U+2028 and its like, which JSON strings may hold.
    """
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if len(data) < len(line) and data and data != b"[DONE]" and line[:5] == b"data:":
                yield json.loads(data)


def _text_of(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


async def _refusal(response: httpx.Response) -> str:
    body = (await response.aread()).decode(errors="replace")
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        said = body
    return f"HTTP {response.status_code}: {str(said)[:200]}"


def _failed(start: float, prompt: Prompt, why: str) -> Reply:
    return Reply(start, (), prompt.tokens, 0, error=why)
