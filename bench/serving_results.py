"""What a serving benchmark finds: the keys and formulas of `vllm bench serve`, and summaries.

For a request of n output tokens whose first event came after TTFT and whose last after E2EL:

    tpot  (E2EL - TTFT) / (n - 1), of requests with n > 1
    itl   every gap between neighbouring events, those of all requests together

guidellm and AIPerf call vLLM's TPOT "inter token latency".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from secateur.bench.load import Reply
from secateur.bench.results import _Facts, _Result

PERCENTILES = (50, 90, 95, 99)
# Milliseconds that the Server summary allows where --slo does not say.
SERVER_LIMITS = {"ttft": 2000.0, "tpot": 200.0}
KNEE = 0.9  # of the highest throughput


class ServingPoint(BaseModel):
    """One load, measured; the keys are those of `vllm bench serve --save-detailed`.

    Beside the fields below: mean, median, std and p50, p90, p95, p99 of ttft, tpot, itl and e2el,
    ``mean_ttft_ms`` and so on, null where no request has any.

    Attributes:
        request_rate: requests a second, or "inf": all at once, as the bound lets them.
        max_concurrency: requests under way at once at most; None: no bound.
        duration: seconds from the first request to the end of the last answer.
        request_goodput: requests a second that keep every limit of ``slo``; None without limits.
        max_output_tokens_per_s: the most events in a second, counted from the first request.
        max_concurrent_requests: the most requests under way in such a second.
        itls: of each request; as input_lens to errors, in the order of sending. Of a request that
            failed everything but start_times and errors is 0 or empty.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None]

    num_prompts: int
    request_rate: float | Literal["inf"]
    burstiness: float
    max_concurrency: int | None
    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    ttfts: tuple[float, ...]
    itls: tuple[tuple[float, ...], ...]
    start_times: tuple[float, ...]
    errors: tuple[str, ...]

    @classmethod
    def of(
        cls,
        replies: Sequence[Reply],
        duration: float,
        *,
        concurrency: int | None = None,
        rate: float = math.inf,
        burstiness: float = 1.0,
        slo: Mapping[str, float] | None = None,
    ) -> Self:
        """Compute everything from the replies to one load; ``slo`` is in milliseconds."""
        good = [reply for reply in replies if reply.error is None]
        read = sum(reply.prompt_tokens for reply in good)
        written = sum(reply.output_tokens for reply in good)
        kept = sum(_keeps(reply, slo or {}) for reply in good)
        tokens, requests = _busiest_second(good)
        first = min((reply.start for reply in replies), default=0.0)
        return cls(
            num_prompts=len(replies),
            request_rate="inf" if math.isinf(rate) else rate,
            burstiness=burstiness,
            max_concurrency=concurrency,
            duration=duration,
            completed=len(good),
            failed=len(replies) - len(good),
            total_input_tokens=read,
            total_output_tokens=written,
            request_throughput=len(good) / duration,
            request_goodput=kept / duration if slo else None,
            output_throughput=written / duration,
            total_token_throughput=(read + written) / duration,
            max_output_tokens_per_s=tokens,
            max_concurrent_requests=requests,
            input_lens=tuple(reply.prompt_tokens for reply in replies),
            output_lens=tuple(reply.output_tokens for reply in replies),
            ttfts=tuple(0.0 if reply.error else reply.ttft for reply in replies),
            itls=tuple(tuple(reply.itls) for reply in replies),
            start_times=tuple(reply.start - first for reply in replies),
            errors=tuple(reply.error or "" for reply in replies),
            **_statistics(good),
        )

    def ms(self, key: str) -> float | None:
        """A latency by its key without the unit, e.g. ``median_ttft``."""
        return self.__pydantic_extra__[f"{key}_ms"]

    @property
    def load(self) -> str:
        """The load in words."""
        if self.request_rate != "inf":
            kind = "" if self.burstiness == 1 else f", burstiness {self.burstiness:g}"
            return f"{self.request_rate:g} requests/s{kind}"
        return f"{self.max_concurrency} at once" if self.max_concurrency else "all at once"


class MlperfSummary(_Facts):
    """What MLPerf Inference's scenarios look at, from the points that were measured.

    Not results in its sense: it asks for more requests, longer runs and its own load generator.

    Attributes:
        single_stream_p90_ms: p90 of e2el, one request at a time.
        offline_tokens_per_s: output of the point where all came at once.
        server_requests_per_s: the highest rate whose p99 of ttft and tpot keep the limits.
        server_limits_ms: these limits.
    """

    single_stream_p90_ms: float | None
    offline_tokens_per_s: float | None
    server_requests_per_s: float | None
    server_limits_ms: dict[str, float]

    @classmethod
    def of(cls, points: Sequence[ServingPoint], slo: Mapping[str, float]) -> Self:
        """Summarise; None where no point of the kind was measured, or none keeps the limits."""
        limits = SERVER_LIMITS | {key: slo[key] for key in SERVER_LIMITS if key in slo}
        single = next((one for one in points if one.max_concurrency == 1), None)
        whole = [p for p in points if p.request_rate == "inf" and p.max_concurrency is None]
        rates = [
            float(point.request_rate)
            for point in points
            if point.request_rate != "inf"
            and not point.failed
            and all((point.ms(f"p99_{key}") or 0) <= limit for key, limit in limits.items())
        ]
        return cls(
            single_stream_p90_ms=single.ms("p90_e2el") if single else None,
            offline_tokens_per_s=whole[0].output_throughput if whole else None,
            server_requests_per_s=max(rates, default=None),
            server_limits_ms=limits,
        )


class ServingResult(_Result):
    """The result of ``bench serving``; docs/bench.md explains every key.

    Attributes:
        url: without ``/v1``; model: as the endpoint names it; api: completions or chat.
        ready: what our server said of itself; None of an endpoint that was there already.
        data: random, or the file; prompt, new_tokens: as they were asked for.
        slo: limits in milliseconds by metric, of goodput.
        knee: the lowest measured concurrency with 90 % of the highest output throughput of the
            points with a bound on concurrency; None if fewer than three have one.
        counted: who counted the output tokens: usage, tokenizer, events (of all requests).
    """

    schema_: Literal["secateur/bench-serving/1"] = Field("secateur/bench-serving/1", alias="schema")
    url: str
    model: str
    api: Literal["completions", "chat"]
    ready: str | None
    data: str
    prompt: int | None
    new_tokens: int | None
    ignore_eos: bool
    seed: int
    slo: dict[str, float]
    counted: dict[str, int]
    knee: int | None
    mlperf: MlperfSummary
    points: tuple[ServingPoint, ...]


def find_knee(points: Sequence[ServingPoint]) -> int | None:
    """See `ServingResult.knee`."""
    bounded = [point for point in points if point.max_concurrency is not None]
    if len(bounded) < 3:
        return None
    highest = max(point.output_throughput for point in bounded)
    return min(
        point.max_concurrency
        for point in bounded
        if point.max_concurrency is not None and point.output_throughput >= KNEE * highest
    )


def _statistics(replies: Sequence[Reply]) -> dict[str, float | None]:
    samples: dict[str, list[float]] = {
        "ttft": [reply.ttft for reply in replies],
        "tpot": [reply.tpot for reply in replies if reply.tpot is not None],
        "itl": [gap for reply in replies for gap in reply.itls],
        "e2el": [reply.latency for reply in replies],
    }
    found: dict[str, float | None] = {}
    for name, seconds in samples.items():
        ms = np.array(seconds) * 1e3
        for key in ("mean", "median", "std"):
            found[f"{key}_{name}_ms"] = float(getattr(np, key)(ms)) if len(ms) else None
        for percent in PERCENTILES:
            value = float(np.percentile(ms, percent)) if len(ms) else None
            found[f"p{percent}_{name}_ms"] = value
    return found


def _keeps(reply: Reply, slo: Mapping[str, float]) -> bool:
    """Whether a reply keeps every limit; a single token has a tpot of 0."""
    seconds = {"ttft": reply.ttft, "tpot": reply.tpot or 0.0, "e2el": reply.latency}
    return all(seconds[name] * 1e3 <= limit for name, limit in slo.items())


def _busiest_second(replies: Sequence[Reply]) -> tuple[float, int]:
    """The most events and the most requests under way in one second since the first request."""
    if not replies:
        return 0.0, 0
    first = min(reply.start for reply in replies)
    seconds = int(max(reply.arrivals[-1] for reply in replies) - first) + 1
    events, active = np.zeros(seconds), np.zeros(seconds, int)
    for reply in replies:
        np.add.at(events, (np.array(reply.arrivals) - first).astype(int), 1)
        active[int(reply.start - first) : int(reply.arrivals[-1] - first) + 1] += 1
    return float(events.max()), int(active.max())
