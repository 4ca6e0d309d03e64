"""Nothing that clients do kills the native server or leaves a page of the KV cache in use.

10 000 requests: bodies that schemathesis makes from our own OpenAPI document, the same with bytes
changed, and garbage instead of HTTP; 200 clients that vanish; signals under load.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .conftest import Server, start_server
from .soak import growth, soak

SCHEMA_CASES, CHANGED, GARBAGE = 400, 7600, 2000
LANES = 24  # requests at once
BODY = {"prompt": "the quick brown", "max_tokens": 4000, "ignore_eos": True}
STATUSES = {200, 400, 404, 405, 413, 429}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    running = start_server(tiny, "--engine", "native", "--max-length", "512")
    yield running
    assert running.stop() == 0


def assert_idle(server: Server) -> None:
    """Nothing runs, waits, or holds a page, at the latest after a while."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    end = time.monotonic() + 30
    while any(server.metric(name) for name in names) and time.monotonic() < end:
        time.sleep(0.05)
    assert [server.metric(name) for name in names] == [0, 0, 0]
    assert httpx.get(f"{server.url}/health").status_code == 200


def cases(described: dict[str, Any], count: int) -> list[tuple[str, str, bytes]]:
    """Method, path and body of requests that follow the document, or just do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from schemathesis.generation import GenerationMode

        document = schemathesis.openapi.from_dict(described)
        operations = [found.ok() for found in document.get_all_operations()]
        strategies = [
            operation.as_strategy(generation_mode=mode)
            for operation in operations
            if operation.method == "post"
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        ]
    made: list[tuple[str, str, bytes]] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(strategies))
    def collect(case: Any) -> None:
        body = case.body if isinstance(case.body, bytes) else encode(case.body)
        made.append((case.method, case.path, body))

    collect()
    return made


def encode(body: Any) -> bytes:
    try:
        return json.dumps(body).encode()
    except TypeError:  # schemathesis' sign for "no body"
        return b""


def changed(cases: list[tuple[str, str, bytes]], count: int) -> list[tuple[str, str, bytes]]:
    """The cases with a few bytes replaced, cut, or doubled, and other methods and paths."""
    chance = random.Random(0)
    paths = sorted({path for _, path, _ in cases})
    made = []
    for _ in range(count):
        method, path, body = chance.choice(cases)
        content = bytearray(body or b"{}")
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(content) + 1)
            piece = chance.choice(
                [b"", b"\x00", b'"', b"}", b"[", b"-", b"9" * 30, b"\xff", b"null"]
            )
            content[at : at + chance.randrange(3)] = piece
        if chance.random() < 0.1:
            path = chance.choice([*paths, "/", "/v1/models/x/../y", "//", "/%00", "/v1/status"])
            method = chance.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "POST"])
        made.append((method, path, bytes(content)))
    return made


def bounded(body: bytes) -> bytes:
    """The same request for a few tokens only, where it is one: the number is not the point."""
    try:
        fields = json.loads(body)
    except ValueError:
        return body
    if isinstance(fields, dict) and ("prompt" in fields or "messages" in fields):
        for name in ("max_tokens", "max_completion_tokens", "n"):
            if type(fields.get(name)) is int and fields[name] > 4:
                fields[name] = 2
        fields.setdefault("max_tokens", 2)
        return json.dumps(fields).encode()
    return body


async def send_all(server: Server, requests: list[tuple[str, str, bytes]]) -> Counter[int]:
    seen: Counter[int] = Counter()
    left = iter(requests)

    async def lane() -> None:
        for method, path, body in left:
            status, answer = await exchange(server, method, path, bounded(body))
            seen[status] += 1
            assert status in STATUSES, (method, path, body, answer)
            if status != 200 and method != "HEAD":
                assert json.loads(answer)["error"]["message"], (method, path, body)

    async with asyncio.TaskGroup() as group:
        for _ in range(LANES):
            group.create_task(lane())
    return seen


async def exchange(server: Server, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of an answer; no library: it would take most of the time."""
    host, port = server.url.removeprefix("http://").split(":")
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    for tries in range(20):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            reading = asyncio.create_task(reader.read())
            if tries:  # perhaps it answers and closes without the body, which would be a reset
                await asyncio.wait({reading}, timeout=1)
            if not reading.done():
                writer.write(body)
            answer = await asyncio.wait_for(reading, 60)
        except ConnectionResetError:
            continue
        finally:
            writer.close()
        head_lines, _, content = answer.partition(b"\r\n\r\n")
        return int(head_lines.split()[1]), content
    raise AssertionError(f"no answer to {method} {path} in twenty tries")


async def send_garbage(server: Server, count: int) -> None:
    """Bytes that are no HTTP, or begin like it; what comes back does not matter."""
    host, port = server.url.removeprefix("http://").split(":")
    chance = random.Random(1)
    starts = [
        b"",
        b"POST /v1/completions HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ]

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(chance.choice(starts) + chance.randbytes(chance.randrange(200)))
        try:
            await writer.drain()
            if chance.random() < 0.1:
                await asyncio.wait_for(reader.read(100), 0.05)
        except (OSError, TimeoutError):
            pass
        writer.close()

    for _ in range(count // 20):
        await asyncio.gather(*(one() for _ in range(20)))


def test_ten_thousand_requests(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    from_schema = cases(described, SCHEMA_CASES)
    assert len(from_schema) >= SCHEMA_CASES
    seen = asyncio.run(send_all(server, from_schema + changed(from_schema, CHANGED)))
    asyncio.run(send_garbage(server, GARBAGE))
    assert sum(seen.values()) + GARBAGE >= 10_000
    assert seen[200] > 100, seen  # some got through to the model
    assert seen[400] > 1000, seen
    assert_idle(server)


def test_two_hundred_clients_that_vanish(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")

    async def vanish(place: int) -> None:
        fields = BODY | {"stream": place % 2 == 0, "max_tokens": 500}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        if place % 4 == 0:
            await reader.readuntil(b"data: ")
        else:
            await asyncio.sleep(place % 7 * 0.05)
        writer.transport.abort()

    async def scenario() -> None:
        await asyncio.gather(*(vanish(place) for place in range(200)))

    before = server.metric("generation_tokens_total")
    asyncio.run(scenario())
    assert_idle(server)
    assert server.metric("generation_tokens_total") > before
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 3}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_under_load_ends_every_stream(slow: Path, signals: list[signal.Signals]) -> None:
    server = start_server(slow, "--engine", "native", "--drain-seconds", "1")
    ends: list[str] = []

    async def stream(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> None:
        body = BODY | {"stream": True}
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = [line async for line in counted(answer, begun) if line]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        ends.append(last["choices"][0]["finish_reason"])

    async def counted(answer: httpx.Response, begun: asyncio.Semaphore) -> Any:
        begun.release()
        async for line in answer.aiter_lines():
            yield line

    async def scenario() -> None:
        begun = asyncio.Semaphore(0)
        async with httpx.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(stream(client, begun))
            for _ in range(20):
                await begun.acquire()
            for number in signals:
                server.process.send_signal(number)
                await asyncio.sleep(0.1)

    asyncio.run(scenario())
    assert ends == ["abort"] * 20
    assert server.process.wait(20) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()


def test_memory_stays_flat_under_mixed_load(server: Server) -> None:
    resident = asyncio.run(soak(server, 12.0, 0.25))  # `make soak`: a real model, half an hour
    assert len(resident) > 20
    assert growth(resident) < 0.05
    assert_idle(server)
