"""Serving metrics: every key against numbers worked out by hand or in the plainest way."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.bench.load import Reply, arrival_times
from secateur.bench.serving import parse_slo
from secateur.bench.serving_results import MlperfSummary, ServingPoint, find_knee
from secateur.errors import UsageError

# Two streams and a failure. The first: events at 1.5, 1.7, 2.1 s of a request of 1.0 s, 5 tokens
# (two came with others); the second: one event, one token.
FIRST = Reply(1.0, (1.5, 1.7, 2.1), prompt_tokens=7, output_tokens=5)
SECOND = Reply(1.2, (1.4,), prompt_tokens=3, output_tokens=1)
FAILED = Reply(1.3, (), prompt_tokens=9, output_tokens=0, error="HTTP 429: too busy")


def test_formulas_by_hand() -> None:
    point = ServingPoint.of([FIRST, SECOND, FAILED], 2.0, concurrency=2, slo={"ttft": 300})
    assert (point.num_prompts, point.completed, point.failed) == (3, 2, 1)
    assert (point.total_input_tokens, point.total_output_tokens) == (10, 6)
    assert point.request_throughput == 1.0
    assert point.output_throughput == 3.0
    assert point.total_token_throughput == 8.0
    assert point.request_goodput == 0.5  # only the second answers within 300 ms
    assert (point.request_rate, point.max_concurrency) == ("inf", 2)
    expected = {
        "mean_ttft": 350,
        "median_ttft": 350,
        "std_ttft": 150,
        "p90_ttft": 470,  # 200 + 0.9 * 300
        "mean_tpot": 150,  # (1.1 - 0.5) / 4; one token has none
        "mean_itl": 300,
        "p99_itl": 398,
        "median_e2el": 650,
        "p50_e2el": 650,
    }
    assert {key: point.ms(key) for key in expected} == pytest.approx(expected)
    # Seconds since 1.0: events at .5 .7 1.1 and .4; requests 0-1.1 and .2-.4.
    assert (point.max_output_tokens_per_s, point.max_concurrent_requests) == (3, 2)
    assert point.errors == ("", "", "HTTP 429: too busy")
    assert point.start_times == pytest.approx((0, 0.2, 0.3))
    assert point.ttfts == pytest.approx((0.5, 0.2, 0))
    assert [len(gaps) for gaps in point.itls] == [2, 0, 0]
    assert ServingPoint.model_validate(json.loads(point.model_dump_json())) == point


def test_limits_hold_together_and_a_single_token_has_a_tpot_of_zero() -> None:
    def goodput(**slo: float) -> float | None:
        return ServingPoint.of([FIRST, SECOND], 1.0, slo=slo).request_goodput

    assert goodput() is None
    assert goodput(tpot=150.1) == 2
    assert goodput(tpot=149) == 1
    assert goodput(tpot=150.1, e2el=1000) == 1
    assert goodput(ttft=1, tpot=150.1) == 0


def test_without_answers_there_are_no_latencies() -> None:
    point = ServingPoint.of([FAILED], 1.0)
    assert point.ms("median_ttft") is None
    assert point.output_throughput == 0
    assert json.loads(point.model_dump_json())["p99_itl_ms"] is None


gaps = st.lists(st.floats(0.001, 2), min_size=1, max_size=8)
streams = st.lists(st.tuples(st.floats(0, 5), gaps, st.integers(1, 9)), min_size=1, max_size=6)


@given(streams)
@settings(max_examples=60, deadline=None)
def test_any_streams_in_the_plainest_way(made: list[tuple[float, list[float], int]]) -> None:
    replies = []
    for start, waits, extra in made:
        times = tuple(start + sum(waits[: i + 1]) for i in range(len(waits)))
        replies.append(Reply(start, times, prompt_tokens=4, output_tokens=len(times) + extra))
    point = ServingPoint.of(replies, 3.0)
    tpots = [
        (r.arrivals[-1] - r.arrivals[0]) / (r.output_tokens - 1)
        for r in replies
        if r.output_tokens > 1
    ]
    itls = [b - a for r in replies for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)]
    ttfts = [r.arrivals[0] - r.start for r in replies]
    for name, seconds in (("ttft", ttfts), ("tpot", tpots), ("itl", itls)):
        if not seconds:
            assert point.ms(f"mean_{name}") is None
            continue
        assert point.ms(f"mean_{name}") == pytest.approx(statistics.fmean(seconds) * 1e3)
        assert point.ms(f"median_{name}") == pytest.approx(statistics.median(seconds) * 1e3)
        assert point.ms(f"std_{name}") == pytest.approx(statistics.pstdev(seconds) * 1e3, abs=1e-6)
    first = min(r.start for r in replies)
    ends = max(r.arrivals[-1] for r in replies) - first
    per_second = [
        sum(s <= t - first < s + 1 for r in replies for t in r.arrivals)
        for s in range(int(ends) + 1)
    ]
    active = [
        sum(r.start - first < s + 1 and r.arrivals[-1] - first >= s for r in replies)
        for s in range(int(ends) + 1)
    ]
    assert point.max_output_tokens_per_s == max(per_second)
    assert point.max_concurrent_requests == max(active)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread_that_was_asked_for(burstiness: float) -> None:
    times = np.array(arrival_times(20_000, 5.0, burstiness, seed=3))
    assert times[-1] == pytest.approx(20_000 / 5.0)
    waits = np.diff(times, prepend=0.0)
    assert (waits >= 0).all()
    # Of a gamma distribution σ/μ = 1/√shape; twenty thousand draws give it within a few percent.
    assert waits.std() / waits.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert arrival_times(9, 5.0, burstiness, seed=3) == arrival_times(9, 5.0, burstiness, seed=3)
    assert arrival_times(9, 5.0, burstiness, seed=3) != arrival_times(9, 5.0, burstiness, seed=4)


def of(throughput: float, concurrency: int | None, **more: float) -> ServingPoint:
    """A point of so many tokens a second; its ttft is 1 s, its tpot 0.1 s."""
    reply = Reply(0.0, (1.0, 1.1), 1, 2)
    point = ServingPoint.of([reply], 2 / throughput, concurrency=concurrency, **more)  # type: ignore[arg-type]
    assert point.output_throughput == pytest.approx(throughput)
    return point


def test_the_knee_is_the_least_concurrency_with_nine_tenths() -> None:
    points = [of(10, 1), of(18, 2), of(30, 4), of(32, 8), of(33, 16)]
    assert find_knee(points) == 4  # 30 >= 0.9 * 33
    assert find_knee(points[:2]) is None
    assert find_knee([*points, of(90, None)]) == 4  # no bound: not on the curve


def test_mlperf_looks_at_points_of_its_kinds() -> None:
    points = [of(10, 8), of(11, 1), of(50, None), of(5, None, rate=2.0), of(6, None, rate=3.0)]
    found = MlperfSummary.of(points, {})
    assert found.single_stream_p90_ms == pytest.approx(1100)
    assert found.offline_tokens_per_s == pytest.approx(50)
    assert found.server_requests_per_s == 3.0
    assert found.server_limits_ms == {"ttft": 2000, "tpot": 200}
    assert MlperfSummary.of(points, {"ttft": 999}).server_requests_per_s is None
    assert MlperfSummary.of(points[:1], {}).single_stream_p90_ms is None


def test_limits_are_read() -> None:
    assert parse_slo("ttft:2000,tpot:0.5") == {"ttft": 2000.0, "tpot": 0.5}
    assert parse_slo("") == {}
    for text, said in (("ttf:1", "did you mean"), ("ttft:x", "MILLI"), ("tpot:-1", "MILLI")):
        with pytest.raises(UsageError) as fault:
            parse_slo(text)
        assert said in str(fault.value)
