"""How an OpenAI endpoint bears loads: closed loops, arrivals at a rate, a sweep to the knee."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from secateur.bench.endpoint import served
from secateur.bench.load import (
    Api,
    Reply,
    Target,
    arrival_times,
    ask,
    drive,
    open_client,
    served_model,
)
from secateur.bench.prompts import Prompts
from secateur.bench.results import Environment
from secateur.bench.serving_results import (
    MlperfSummary,
    ServingPoint,
    ServingResult,
    find_knee,
)
from secateur.bench.subjects import notes_on_machine
from secateur.device import choose_device
from secateur.errors import EnvironmentFault, UsageError, did_you_mean
from secateur.progress import Tick, no_tick
from secateur.recipe import Section

if TYPE_CHECKING:
    import httpx

SLO_METRICS = ("ttft", "tpot", "e2el")
_NEW_TOKENS = 64  # of answers to random prompts
_GAIN = 1.1  # a doubling of the concurrency that brings less ends the sweep
_WIDEST = 512  # concurrency at which a sweep ends in any case


class ServingSettings(Section):
    """What `bench serving` measures.

    Attributes:
        concurrency: closed loops with so many requests under way.
        rate: requests a second of open loops; inf: all at once.
        burstiness: shape of the gamma distributed gaps of open loops; 1: a Poisson process.
        sweep: double the concurrency from 1 on until it brings less than 10 %.
        requests: of each point; None: 4 a unit of concurrency, 30 seconds of a rate, 16 at least.
        slo: milliseconds by metric (ttft, tpot, e2el).
    """

    concurrency: tuple[int, ...] = ()
    rate: tuple[float, ...] = ()
    burstiness: float = Field(1.0, gt=0)
    sweep: bool = False
    requests: int | None = Field(None, ge=1)
    data: str = "random"
    prompt: int = Field(128, ge=1)
    new_tokens: int | None = Field(None, ge=1)
    ignore_eos: bool | None = None
    slo: dict[str, float] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)


def measure_serving(
    where: str,
    settings: ServingSettings | None = None,
    *,
    model: str | None = None,
    tokenizer: str | Path | None = None,
    api: Api = "completions",
    serve_arguments: Sequence[str] = (),
    command: str = "",
    progress: Tick = no_tick,
) -> ServingResult:
    """Put an endpoint under one load after another.

    Args:
        where: its address, or a model directory, which `secateur serve` serves meanwhile.
        settings: loads and prompts; None: the defaults, at concurrency 1, 8 and 32.
        model: the name to ask for; None: the first that the endpoint offers.
        tokenizer: directory whose tokenizer makes and counts tokens; None: that of ``where``, if it
            is a directory.
        api: which of OpenAI's two APIs to ask.
        serve_arguments: of `secateur serve`.
        command: kept in the result.
        progress: called with (answers, requests) of each point.

    Raises:
        UsageError: a setting contradicts itself, or the endpoint wants a key.
        ModelError: the directory, tokenizer or file is missing or damaged.
        EnvironmentFault: nothing answers there, or with errors only.
    """
    settings = settings or ServingSettings()
    if not (settings.concurrency or settings.rate or settings.sweep):
        settings = settings.model_copy(update={"concurrency": (1, 8, 32)})
    if settings.data == "random" and settings.new_tokens is None:
        settings = settings.model_copy(update={"new_tokens": _NEW_TOKENS})
    url = _address(where)
    if serve_arguments and url:
        raise UsageError(
            f"{serve_arguments[0]} is for `secateur serve`, and {where} is served already",
            "leave it out, or give a model directory",
        )
    words = _tokenizer(where if tokenizer is None and url is None else tokenizer)
    prompts = Prompts(
        settings.data,
        tokenizer=words,
        length=settings.prompt,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
    )
    eos = settings.ignore_eos
    target = Target(
        url or "",
        model or "",
        api,
        ignore_eos=settings.data == "random" if eos is None else eos,
        count=(lambda text: len(words(text)["input_ids"])) if words is not None else None,
    )
    with ExitStack() as stack:
        endpoint = None if url else stack.enter_context(served(where, serve_arguments))
        if endpoint is not None:
            target = replace(target, url=endpoint.url)
        environment = Environment.read(choose_device("cpu"))
        target, points, replies = asyncio.run(_measure(target, prompts, settings, progress))
    counted = Counter(reply.counted for reply in replies if reply.error is None)
    return ServingResult(
        command=command,
        environment=environment,
        dtype="that of the server",
        notes=tuple(_notes(environment, prompts, counted, endpoint is not None)),
        url=target.url,
        model=target.model,
        api=api,
        ready=endpoint.ready if endpoint else None,
        data=settings.data,
        prompt=settings.prompt if settings.data == "random" else None,
        new_tokens=settings.new_tokens,
        ignore_eos=target.ignore_eos,
        seed=settings.seed,
        slo=settings.slo,
        counted=dict(counted),
        knee=find_knee(points),
        mlperf=MlperfSummary.of(points, settings.slo),
        points=tuple(points),
    )


def parse_slo(text: str) -> dict[str, float]:
    """Read ``ttft:2000,tpot:200``: milliseconds that a good request may take.

    Raises:
        UsageError: a metric is unknown, or a limit is no positive number.
    """
    limits = {}
    for part in filter(None, text.split(",")):
        name, _, limit = part.partition(":")
        if name not in SLO_METRICS:
            raise UsageError(f"there is no limit on {name!r}", did_you_mean(name, SLO_METRICS))
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = math.nan
        if not 0 < limits[name] < math.inf:
            raise UsageError(
                f"--slo {part!r} is not METRIC:MILLISECONDS", "e.g. --slo ttft:2000,tpot:200"
            )
    return limits


async def _measure(
    target: Target, prompts: Prompts, settings: ServingSettings, progress: Tick
) -> tuple[Target, list[ServingPoint], list[Reply]]:
    """The target with its model's name, the points, and the replies of all of them."""
    points: list[ServingPoint] = []
    answers: list[Reply] = []
    async with open_client(target.url) as client:
        if not target.model:
            target = replace(target, model=await served_model(client))

        async def point(concurrency: int | None, rate: float = math.inf) -> ServingPoint:
            count = settings.requests or _requests(concurrency, rate)
            await _warm_up(client, target, prompts)
            when = None
            if not math.isinf(rate):
                seed = settings.seed + len(points)
                when = arrival_times(count, rate, settings.burstiness, seed)
            replies, duration = await drive(
                client,
                target,
                prompts.take(count),
                concurrency=concurrency,
                arrivals=when,
                progress=progress,
            )
            answers.extend(replies)
            points.append(
                ServingPoint.of(
                    replies,
                    duration,
                    concurrency=concurrency,
                    rate=rate,
                    burstiness=settings.burstiness,
                    slo=settings.slo,
                )
            )
            return points[-1]

        for concurrency in settings.concurrency:
            await point(concurrency)
        for rate in settings.rate:
            await point(None, rate)
        if settings.sweep:
            await _sweep(point)
    return target, points, answers


async def _sweep(point: Callable[[int], Awaitable[ServingPoint]]) -> None:
    """Double the concurrency while that brings a tenth more output, or until requests fail."""
    before, concurrency = 0.0, 1
    while concurrency <= _WIDEST:
        measured = await point(concurrency)
        if measured.failed or measured.output_throughput < _GAIN * before:
            return
        before = measured.output_throughput
        concurrency *= 2


async def _warm_up(client: httpx.AsyncClient, target: Target, prompts: Prompts) -> None:
    """One request that does not count.

    Raises:
        EnvironmentFault: it fails.
    """
    reply = await ask(client, target, prompts.take(1)[0])
    if reply.error is not None:
        raise EnvironmentFault(
            f"{target.url}{target.path} does not answer the first request: {reply.error}",
            "correct --model, --prompt, --new-tokens or --api, or look into the server's log",
        )


def _requests(concurrency: int | None, rate: float) -> int:
    if concurrency is not None:
        return max(16, 4 * concurrency)
    return 64 if math.isinf(rate) else max(16, math.ceil(30 * rate))


def _address(where: str) -> str | None:
    """The address without ``/v1``, or None if it is not one."""
    if not where.startswith(("http://", "https://")):
        return None
    return where.rstrip("/").removesuffix("/v1")


def _notes(
    environment: Environment, prompts: Prompts, counted: Mapping[str, int], ours: bool
) -> list[str]:
    notes = [] if ours else ["environment is that of the client; the server may run elsewhere"]
    if ours:
        notes.append("the server and the client share this machine's cores")
    if counted.get("tokenizer"):
        notes.append("the endpoint does not count tokens: those of its texts were counted here")
    if counted.get("events"):
        notes.append("the endpoint does not count tokens: each event was taken for one")
    if prompts.again:
        notes.append(
            f"the file of prompts was read {prompts.again + 1} times: a server that keeps the work "
            "of earlier prompts answers repeated ones sooner"
        )
    return notes + notes_on_machine(environment)


def _tokenizer(directory: str | Path | None) -> Any:
    if directory is None:
        return None
    from secateur.model import load_tokenizer

    return load_tokenizer(directory)
