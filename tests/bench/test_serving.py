"""The load generator over real HTTP, against an endpoint that streams what it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from secateur.bench import ServingResult, ServingSettings, measure_serving
from secateur.bench.load import Reply, Target, ask, drive, open_client
from secateur.bench.prompts import Prompt, Prompts
from secateur.bench.serving import _sweep
from secateur.bench.serving_results import ServingPoint
from secateur.cli import app
from secateur.errors import EnvironmentFault, ModelError, UsageError

from .fake_endpoint import DONE, Fake, answer, event, fake_endpoint, token, usage

PROMPT = Prompt("one two three", 3, 4)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_endpoint() as endpoint:
        yield endpoint


def asked(fake: Fake, prompt: Prompt = PROMPT, **target: Any) -> Reply:
    async def run() -> Reply:
        async with open_client(fake.url) as client:
            return await ask(client, Target(fake.url, "fake", **target), prompt)

    return asyncio.run(run())


def driven(fake: Fake, prompts: list[Prompt], **load: Any) -> tuple[list[Reply], float]:
    async def run() -> tuple[list[Reply], float]:
        async with open_client(fake.url) as client:
            return await drive(client, Target(fake.url, "fake"), prompts, **load)

    return asyncio.run(run())


def test_a_stream_is_counted_and_timed(fake: Fake) -> None:
    def paced(_: dict[str, Any]) -> Iterator[bytes | float]:
        yield b": ping\n\n"
        yield 0.2
        yield token("a")
        yield 0.1
        yield token("")  # a token without text is one, too
        yield 0.1
        yield token("c") + token("d")
        yield usage(11, 5)
        yield 0.3  # what comes after the last token is no latency
        yield DONE

    fake.script = paced
    reply = asked(fake)
    assert (reply.error, reply.counted) == (None, "usage")
    assert (reply.prompt_tokens, reply.output_tokens, len(reply.arrivals)) == (11, 5, 4)
    # Pauses are lower bounds on any machine.
    assert reply.ttft >= 0.2
    assert reply.latency >= 0.4
    assert reply.tpot == pytest.approx((reply.latency - reply.ttft) / 4)
    assert sum(reply.itls) == pytest.approx(reply.latency - reply.ttft)


def test_the_request_is_what_the_apis_define(fake: Fake) -> None:
    asked(fake)
    (body,) = fake.bodies
    assert body["path"] == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"]) == (PROMPT.text, 4, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})

    def chat(_: dict[str, Any]) -> Iterator[bytes | float]:
        yield event(choices=[{"delta": {"role": "assistant"}}])
        yield event(choices=[{"delta": {"content": "yes"}}])

    fake.script = chat
    reply = asked(fake, api="chat", ignore_eos=False, count=len)
    body = fake.bodies[1]
    assert body["path"] == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": PROMPT.text}]
    assert body["max_completion_tokens"] == 4
    assert "ignore_eos" not in body
    assert (reply.output_tokens, reply.counted) == (3, "tokenizer")  # len("yes")


def test_events_are_read_however_they_are_cut(fake: Fake) -> None:
    whole = token("a\u2028b") + token("ü") + usage(3, 2) + DONE

    def cut(_: dict[str, Any]) -> Iterator[bytes | float]:
        yield from (whole[i : i + 3] for i in range(0, len(whole), 3))

    fake.script = cut
    reply = asked(fake)
    assert (reply.error, reply.output_tokens, len(reply.arrivals)) == (None, 2, 2)


def test_nobody_counts_the_tokens(fake: Fake) -> None:
    fake.script = lambda _: iter([token("a b"), token(" c"), DONE])
    reply = asked(fake)
    assert (reply.output_tokens, reply.counted, reply.prompt_tokens) == (2, "events", 3)
    reply = asked(fake, count=lambda text: len(text.split()))
    assert (reply.output_tokens, reply.counted) == (3, "tokenizer")


def test_failures_are_replies(fake: Fake) -> None:
    fake.script = lambda _: iter([token("a"), event(error={"message": "out of memory"})])
    assert "out of memory" in str(asked(fake).error)
    fake.script = lambda _: iter([DONE])
    assert "no choice" in str(asked(fake).error)
    fake.script = lambda _: iter([token("a"), b""])
    assert "RemoteProtocolError" in str(asked(fake).error)
    fake.script = lambda _: iter([b"data: {broken\n\n"])
    assert "JSONDecodeError" in str(asked(fake).error)
    fake.status = 429
    assert asked(fake).error == "HTTP 429: too busy"


@pytest.mark.parametrize("bound", [1, 3])
def test_as_many_requests_are_under_way_as_are_allowed(fake: Fake, bound: int) -> None:
    gate = threading.Barrier(bound)

    def together(body: dict[str, Any]) -> Iterator[bytes | float]:
        gate.wait(30)  # goes on only once so many are here
        yield from answer(body)

    fake.script = together
    replies, duration = driven(fake, [PROMPT] * 9, concurrency=bound)
    assert [reply.error for reply in replies] == [None] * 9
    assert fake.most == bound
    assert duration >= max(r.arrivals[-1] for r in replies) - min(r.start for r in replies)


def test_arrivals_are_not_held_back_by_slow_answers(fake: Fake) -> None:
    gate = threading.Barrier(5)

    def together(body: dict[str, Any]) -> Iterator[bytes | float]:
        gate.wait(30)
        yield from answer(body)

    fake.script = together
    due = [0.0, 0.05, 0.1, 0.15, 0.2]
    replies, _ = driven(fake, [PROMPT] * 5, arrivals=due)
    assert [reply.error for reply in replies] == [None] * 5
    for reply, when in zip(replies, due, strict=True):
        assert reply.start - replies[0].start >= when - 0.04  # the first may be late itself


def test_the_sweep_ends_where_doubling_brings_little() -> None:
    async def swept(throughputs: dict[int, float], failing: int | None = None) -> list[int]:
        ran = []

        async def point(concurrency: int) -> ServingPoint:
            ran.append(concurrency)
            reply = Reply(0.0, (1.0,), 1, 10)
            replies = (
                [reply, Reply(0.0, (), 0, 0, error="x")] if concurrency == failing else [reply]
            )
            return ServingPoint.of(replies, 10 / throughputs[concurrency], concurrency=concurrency)

        await _sweep(point)
        return ran

    curve = {1: 10.0, 2: 20.0, 4: 36.0, 8: 39.0, 16: 80.0}
    assert asyncio.run(swept(curve)) == [1, 2, 4, 8]
    assert asyncio.run(swept(curve, failing=2)) == [1, 2]
    endless = {2**i: 3.0**i for i in range(12)}
    assert asyncio.run(swept(endless))[-1] == 512


def test_an_endpoint_under_loads(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a b\nc d e\n\nf\n")
    settings = ServingSettings(
        concurrency=(2,), rate=(200.0,), requests=4, data=str(file), new_tokens=3, slo={"e2el": 6e4}
    )
    result = measure_serving(fake.url + "/v1/", settings, command="typed")
    assert ServingResult.model_validate(json.loads(json.dumps(result.to_json()))) == result
    assert (result.model, result.url, result.command) == ("fake", fake.url, "typed")
    closed, opened = result.points
    assert (closed.max_concurrency, closed.request_rate) == (2, "inf")
    assert (opened.max_concurrency, opened.request_rate) == (None, 200.0)
    for point in result.points:
        assert (point.completed, point.total_output_tokens) == (4, 12)
        assert point.output_lens == (3,) * 4
        assert point.request_goodput == pytest.approx(4 / point.duration)
    # A request before each point does not count; the file goes on where it stopped, and round.
    texts = [body["prompt"] for body in fake.bodies]
    assert texts[0] == "a b"
    assert sorted(texts[1:5]) == sorted(["c d e", "f", "a b", "c d e"])
    assert texts[5] == "f"
    assert closed.total_input_tokens == 2 * 3 + 1 + 2
    assert any("read 4 times" in note for note in result.notes)
    assert "ignore_eos" not in fake.bodies[0]
    assert result.counted == {"usage": 8}


def test_what_cannot_be_asked_is_said_first(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="vocabulary of a tokenizer"):
        measure_serving(fake.url)
    with pytest.raises(UsageError, match="served already"):
        measure_serving(fake.url, serve_arguments=["--engine", "native"])
    file = tmp_path / "a.txt"
    file.write_text("hello")
    with pytest.raises(UsageError, match="how long the answers"):
        measure_serving(fake.url, ServingSettings(data=str(file)))
    settings = ServingSettings(data=str(file), new_tokens=2)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    measure_serving(fake.url, settings.model_copy(update={"requests": 1, "concurrency": (1,)}))
    assert fake.headers[-1]["Authorization"] == "Bearer sesame"
    fake.models = None
    with pytest.raises(UsageError, match="wants an API key"):
        measure_serving(fake.url, settings)
    fake.models = {"data": []}
    with pytest.raises(EnvironmentFault, match="names no model"):
        measure_serving(fake.url, settings)
    fake.models, fake.status = {"data": [{"id": "x"}]}, 500
    with pytest.raises(EnvironmentFault, match="first request: HTTP 500: too busy"):
        measure_serving(fake.url, settings)
    with pytest.raises(EnvironmentFault, match="nobody answers"):
        measure_serving("http://127.0.0.1:1", settings)


def test_random_prompts_have_their_length(tiny: Path) -> None:
    from secateur.model import load_tokenizer

    tokenizer = load_tokenizer(tiny)
    drawn = Prompts(tokenizer=tokenizer, length=12, new_tokens=5, seed=7).take(6)
    assert [len(tokenizer(one.text)["input_ids"]) for one in drawn] == [12] * 6
    assert [(one.tokens, one.new_tokens) for one in drawn] == [(12, 5)] * 6
    assert len({one.text for one in drawn}) == 6
    again = Prompts(tokenizer=tokenizer, length=12, new_tokens=5, seed=7)
    assert [*again.take(2), *again.take(4)] == drawn
    assert Prompts(tokenizer=tokenizer, length=12, seed=8).take(1)[0].text != drawn[0].text


def test_files_of_prompts(tiny: Path, tmp_path: Path) -> None:
    from secateur.model import load_tokenizer

    tokenizer = load_tokenizer(tiny)  # a token a byte
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"prompt": "abc", "completion": "de"}\n{"prompt": "f", "completion": "ghi"}\n'
    )
    read = Prompts(str(lines), tokenizer=tokenizer).take(2)
    assert read == [Prompt("abc", 3, 2), Prompt("f", 1, 3)]
    share = tmp_path / "share.json"
    long = "x" * 1025
    talks = [("hello", "to you"), ("hi", "too short"), (long, "too long"), ("alone", None)]
    turns = [[{"from": "x", "value": text} for text in talk if text] for talk in talks]
    share.write_text(json.dumps([{"conversations": both} for both in turns]))
    supply = Prompts(str(share), tokenizer=tokenizer)
    assert supply.take(2) == [Prompt("hello", 5, 6)] * 2
    assert supply.again == 1
    for name, text in (("b.jsonl", '{"question": 1}'), ("c.jsonl", "{"), ("d.txt", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelError):
            Prompts(str(tmp_path / name), new_tokens=1)
    with pytest.raises(ModelError, match="cannot be read"):
        Prompts(str(tmp_path / "absent.txt"), new_tokens=1)


def test_a_directory_is_served_meanwhile(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = CliRunner().invoke(
        app,
        ["bench", "serving", str(tiny), "--concurrency", "1,2,4", "--rate", "inf",
         "--requests", "4", "--prompt", "8", "--new-tokens", "3", "--threads", "1",
         "--slo", "e2el:60000", "--output", str(out), "--quiet"],
    )  # fmt: skip
    assert done.exception is None, done.exception
    result = ServingResult.model_validate_json(out.read_text())
    assert result.ready is not None
    assert "engine: native" in result.ready
    assert [point.max_concurrency for point in result.points] == [1, 2, 4, None]
    for point in result.points:
        assert (point.completed, point.failed) == (4, 0)
        assert point.output_lens == (3,) * 4
        assert point.input_lens == (8,) * 4
        assert point.request_goodput is not None
        assert f"{point.output_throughput:.1f}" in done.stdout
    assert (result.new_tokens, result.ignore_eos, result.seed) == (3, True, 0)
    assert result.knee in (1, 2, 4)
    assert f"knee: {result.knee} at once" in done.stdout
    assert "Offline, tokens/s" in done.stdout
    with pytest.raises(httpx.ConnectError):  # the server has gone
        httpx.get(result.url + "/health")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concurrency", "1,x"], "--concurrency 1,x is not positive numbers"),
        (["--rate", "-1"], "--rate -1 is not positive numbers"),
        (["--api", "chats"], "did you mean 'chat'"),
        (["--slo", "tftt:3"], "there is no limit on 'tftt'"),
        (["--burstiness", "0"], "burstiness = 0"),
    ],
)
def test_wrong_flags_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as fault:
        CliRunner().invoke(
            app, ["bench", "serving", "http://127.0.0.1:1", *arguments], catch_exceptions=False
        )
    assert said in str(fault.value)
