"""What bounds a server: queues, bodies, headers, flags; and what it says about itself."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import COMMAND, Server, start_server

BODY = {"prompt": "the quick", "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(tiny: Path) -> Iterator[Server]:
    """One request at a time, two in the queue."""
    running = start_server(tiny, "--engine", "native", "--max-running", "1", "--max-waiting", "2")
    yield running
    assert running.stop() == 0


def test_too_many_requests(narrow: Server) -> None:
    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=60) as client:
            body = BODY | {"max_tokens": 1000}
            asked = [client.post("/v1/completions", json=body) for _ in range(12)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(scenario())
    refused = [answer for answer in answers if answer.status_code == 429]
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(refused) + len(served) == 12
    assert refused
    assert len(served) >= 2
    for answer in refused:
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert narrow.metric("num_requests_waiting") == 0


def test_all_choices_or_none(narrow: Server) -> None:
    answer = httpx.post(f"{narrow.url}/v1/completions", json=BODY | {"n": 9})
    assert answer.status_code == 429
    short = httpx.post(f"{narrow.url}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=60)
    assert short.status_code == 200  # what was queued of the other is gone


def test_the_user_field_is_the_client(narrow: Server) -> None:
    for user, status in (("me", 200), (5, 400), ("x" * 513, 400)):
        body = BODY | {"max_tokens": 1, "user": user}
        assert httpx.post(f"{narrow.url}/v1/completions", json=body).status_code == status


def exchange(server: Server, sent: bytes) -> bytes:
    """Send bytes, return all that comes until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as link:
        link.sendall(sent)
        parts = []
        try:
            while part := link.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
    return b"".join(parts)


def test_headers_are_limited(narrow: Server) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (at, b"a" * 1000) for at in range(200))
    answer = exchange(narrow, b"GET /health HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n")
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert httpx.get(f"{narrow.url}/health").status_code == 200


def test_too_many_messages_and_biases(narrow: Server) -> None:
    messages = [{"role": "user", "content": "a"}] * 4097
    answer = httpx.post(f"{narrow.url}/v1/chat/completions", json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    biases = {"logit_bias": {str(token): 1 for token in range(5000)}}
    answer = httpx.post(f"{narrow.url}/v1/completions", json=BODY | biases)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


def test_a_slow_body_is_given_up(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    from secateur.serve import app as module
    from secateur.serve import load

    monkeypatch.setattr(module, "BODY_SECONDS", 0.05)

    monkeypatch.setattr(module.Request, "stream", lambda self: _never())
    engine = load(tiny, engine="native", threads=1)
    try:
        with TestClient(module.create_app(engine)) as client:
            answer = client.post("/v1/completions", json=BODY)
    finally:
        engine.close()
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "request_timeout"


async def _never() -> Any:
    await asyncio.sleep(3600)
    yield b""


def test_status_and_metrics(server: Server) -> None:
    asked = {"prompt": [5] * 300, "max_tokens": 5, "ignore_eos": True}
    for _ in range(2):
        assert httpx.post(f"{server.url}/v1/completions", json=asked).status_code == 200
    status = httpx.get(f"{server.url}/v1/status").json()
    assert status["model"] == "tiny-llama"
    assert status["max_model_len"] == 4096
    assert status["has_chat_template"] is True
    assert status["tokens_per_second"] > 0
    assert status["running"] == status["waiting"] == status["pages_used"] == 0
    if status["engine"] == "native":
        assert status["pages"] > 0
        assert any("dense" in line for line in status["layers"])
        assert server.metric("prefix_cache_hits_total") >= 288  # whole pages of 300 tokens
        assert server.metric("prefix_cache_queries_total") >= 600
    for name in ("kv_cache_usage_perc", "num_preemptions_total"):
        assert server.metric(name) == 0
    for name in ("request_queue_time_seconds", "time_to_first_token_seconds"):
        assert server.metric(f"{name}_count") >= 2


def test_the_page_may_only_run_its_own_script(server: Server) -> None:
    answer = httpx.get(server.url)
    assert answer.headers["content-type"].startswith("text/html")
    rules = answer.headers["content-security-policy"]
    assert "default-src 'none'" in rules
    assert "unsafe" not in rules
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", answer.text)  # nothing from elsewhere
    assert "innerHTML" not in answer.text


def test_openapi_describes_every_path(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    for path, operations in described["paths"].items():
        for method in operations:
            assert httpx.request(method, server.url + path).status_code in (200, 400)
    schemas = described["components"]["schemas"]
    assert schemas["ChatBody"]["required"] == ["messages"]
    assert "response_format" in schemas["CompletionBody"]["properties"]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--engine", "transformers", "--max-running", "2"], 2, "--max-running: only the native"),
        (["--engine", "native", "--kv-cache-type", "fp64"], 2, "fp64"),
        (["--engine", "native", "--head-values", "int3"], 2, "int3"),
        (["--engine", "native", "--kv-cache-memory", "lots"], 2, "'lots' is not understood"),
        (["--engine", "native", "--kv-cache-memory", "1B"], 2, "1 bytes hold"),
        (["--max-waiting", "-1"], 2, "max-waiting"),
    ],
)
def test_flags_that_cannot_be(tiny: Path, options: list[str], code: int, says: str) -> None:
    ended = subprocess.run(
        [*COMMAND, str(tiny), "--port", "0", *options], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_family_that_only_transformers_knows(make_model: Any, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "gpt2", "gpt2")
    ended = subprocess.run(
        [*COMMAND, str(directory), "--engine", "native"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 3
    assert "gpt2" in ended.stderr
    process = subprocess.Popen(
        [*COMMAND, str(directory), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "engine: transformers" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert re.search(r"engine auto: transformers \(.*gpt2", process.stderr.read())


def test_the_native_process_imports_neither_torch_nor_transformers(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *COMMAND[1:], str(tiny), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = re.search(r"at (http://\S+) \(engine: native", process.stdout.readline())
        assert url
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        body["response_format"] = {"type": "json_object"}
        assert httpx.post(f"{url[1]}/v1/chat/completions", json=body).status_code == 200
        assert httpx.get(url[1]).status_code == 200
        process.send_signal(signal.SIGTERM)
        imported = {line.rpartition("|")[2].strip() for line in process.stderr}
    assert {"numpy", "uvicorn", "llguidance"} <= imported
    assert not {"torch", "transformers", "scipy", "fastapi", "accelerate"} & imported
