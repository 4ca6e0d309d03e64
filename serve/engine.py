"""What every engine offers: submit a request, receive its tokens, let go of it.

The HTTP app knows engines only through this file. An engine computes on threads of its own; a
`Generation` carries the tokens over to the event loop of whoever submitted the request.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Literal

from secateur.serve.constraint import Constraint
from secateur.serve.sampling import SamplingParameters, TokenLogprobs
from secateur.serve.text import TextCodec

FinishReason = Literal["stop", "length", "abort"]


class RequestRefused(ValueError):
    """A request that the model cannot serve.

    Args:
        what: one sentence for the sender.
        param: the field at fault, in the words of the OpenAI API.
        code: a machine-readable reason.
    """

    def __init__(self, what: str, param: str, code: str) -> None:
        super().__init__(what)
        self.param = param
        self.code = code


class EngineUnavailable(RuntimeError):
    """The engine takes no requests: it is shutting down, or its worker has died."""


class EngineBusy(RuntimeError):
    """Too many requests wait already.

    Args:
        what: one sentence for the sender.
        retry_after: seconds after which it is worth another try.
    """

    def __init__(self, what: str, retry_after: float) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class GenerationFault(RuntimeError):
    """One request failed; the engine goes on."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        prompt: token ids.
        sampling: how tokens are chosen.
        max_tokens: tokens to generate at most; None: up to the model's maximum length.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the text besides the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        logprobs: number of alternatives to report per generated token; None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt.
        client: whose request it is: those who wait take turns by this name.
        constraint: what the text must look like; its state belongs to this one sequence.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    client: str = ""
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a generation.

    Attributes:
        token_id: the new token; None if the step brought none (nothing to generate, aborted).
        text: the text that may be shown now; often, but not always, that of the token.
        logprobs: of the new token, if asked for.
        finish_reason: set in the last event: "stop" (end-of-sequence or a stop), "length" or
            "abort" (the engine is shutting down).
        prompt_logprobs: in the first event, if asked for: one entry per prompt token, None for
            the first of them.
        time: `time.monotonic` when the step was done.
    """

    token_id: int | None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    time: float = field(default_factory=time.monotonic)


class Generation(AsyncIterator[Event]):
    """A submitted request: iterate over it for its events, `cancel` it when nobody listens.

    Must be made inside the event loop that will read it. The engine calls `deliver`, from any
    thread; iterating raises `GenerationFault` if the engine delivered one.

    Attributes:
        request: what was asked for.
        cancelled: the engine drops the request when it sees this.
        submitted: `time.monotonic` when it was made.
        started: when the engine began to compute, set by the engine.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.cancelled = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | GenerationFault] = asyncio.Queue()
        self._ended = False

    def deliver(self, item: Event | GenerationFault) -> None:
        """Hand an event over to the reader."""
        self.deliver_all([(self, item)])

    @staticmethod
    def deliver_all(items: Iterable[tuple[Generation, Event | GenerationFault]]) -> None:
        """Hand over the events of one step: each reader's loop is woken once."""
        by_loop = defaultdict(list)
        for generation, item in items:
            by_loop[generation._loop].append((generation, item))
        for loop, its_items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, its_items)
            except RuntimeError:  # the readers' loop is closed
                for generation, _ in its_items:
                    generation.cancelled = True

    def cancel(self) -> None:
        """Tell the engine to drop the request."""
        self.cancelled = True

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, GenerationFault):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item


def _put_all(items: Iterable[tuple[Generation, Event | GenerationFault]]) -> None:
    for generation, item in items:
        generation._queue.put_nowait(item)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy an engine is.

    Attributes:
        running: requests being computed.
        waiting: requests that wait for their turn.
        pages: pages of the KV cache; 0 if the engine has none.
        pages_used: those that running requests hold.
        prefix_queries: prompt tokens looked up in the prefix cache so far.
        prefix_hits: those found there.
        preemptions: running requests sent back to wait so far, for want of pages.
    """

    running: int
    waiting: int
    pages: int = 0
    pages_used: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class Engine(ABC):
    """Runs one model.

    Attributes:
        name: which engine this is, as in ``--engine``.
        model_name: the name under which the model is served.
        description: facts for the log: type, threads, lengths.
        codec: the model's tokenizer.
        vocabulary_size: token ids are below it.
        max_length: prompt and output together may have this many tokens.
        end_tokens: after these the model itself says that the text is over.
    """

    name: str
    model_name: str
    description: str
    codec: TextCodec
    vocabulary_size: int
    max_length: int
    end_tokens: frozenset[int]

    def report(self) -> tuple[str, ...]:
        """What computes what, in a few lines: layouts, value types, bytes."""
        return ()

    @abstractmethod
    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request; call it inside an event loop.

        Raises:
            RequestRefused: see `check_request`.
            EngineUnavailable: the engine takes no requests any more.
            EngineBusy: too many wait already.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """How busy the engine is now."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why the engine takes no requests, or None if it does."""

    @abstractmethod
    def drain(self, seconds: float) -> None:
        """Take no more requests, and abort those that still run after ``seconds``."""

    @abstractmethod
    def close(self) -> None:
        """Abort everything and free the threads; may be called twice."""


def check_request(request: GenerationRequest, engine: Engine) -> None:
    """Refuse what the model cannot serve.

    Raises:
        RequestRefused: the prompt is empty or too long, or a token id does not exist.
    """
    length, limit = len(request.prompt), engine.max_length
    wanted = 1 if request.max_tokens is None else request.max_tokens
    if not length:
        raise RequestRefused("the prompt has no tokens", "prompt", "empty_prompt")
    if length + wanted > limit:
        raise RequestRefused(
            f"this model's maximum context length is {limit} tokens; the request asks for "
            f"{length + wanted} ({length} in the prompt, {wanted} to generate)",
            "max_tokens" if length < limit else "prompt",
            "context_length_exceeded",
        )
    for param, ids in (
        ("prompt", request.prompt),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < engine.vocabulary_size:
            raise RequestRefused(
                f"a token id in {param} is out of range: they go from 0 to "
                f"{engine.vocabulary_size - 1}",
                param,
                "invalid_token_id",
            )
