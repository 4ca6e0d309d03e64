"""Whatever a client sends, it gets an OpenAI error object and the server lives."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {}}
IMAGE = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]


def raw(text: str) -> bytes:
    return text.encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, b"", 400, None),
        (COMPLETIONS, b"{", 400, None),
        (COMPLETIONS, b"\xff\xfe", 400, None),
        (COMPLETIONS, b"[" * 100_000, 400, None),
        (COMPLETIONS, [1, 2], 400, None),
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": None}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [10**30]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
        (COMPLETIONS, raw('{"prompt": "\\ud800"}'), 400, None),
        (COMPLETIONS, {"prompt": [5] * 5000}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 4090, "max_tokens": 7}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10**40}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, 400, "temperature"),
        (COMPLETIONS, raw('{"prompt": "a", "temperature": NaN}'), 400, "temperature"),
        (COMPLETIONS, raw('{"prompt": "a", "temperature": 1e999}'), 400, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
        (COMPLETIONS, raw('{"prompt": "a", "min_p": Infinity}'), 400, "min_p"),
        (COMPLETIONS, {"prompt": "a", "top_k": -2}, 400, "top_k"),
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n"),
        (COMPLETIONS, {"prompt": ["a"] * 9, "n": 128}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": True}, 400, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, 400, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": {"b": 1}}, 400, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [999]}, 400, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"999": 1}}, 400, "logit_bias"),
        (COMPLETIONS, raw('{"prompt": "a", "logit_bias": {"1": NaN}}'), 400, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "seed": 2**70}, 400, "seed"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream"),
        (COMPLETIONS, {"prompt": "a", "suffix": "z"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of"),
        (COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        (COMPLETIONS, b"x" * (8 * 2**20 + 1), 413, None),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": "hi"}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 9000}]}, 400, "prompt"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
        (CHAT, {"messages": HELLO, "tools": [TOOL]}, 400, "tools"),
        (CHAT, {"messages": HELLO, "response_format": SCHEMA}, 400, "response_format"),
        (CHAT, {"messages": HELLO, "modalities": ["text", "audio"]}, 400, "modalities"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/v1/nothing", {}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict | str) else None,
)
def test_malformed(server: Any, path: str, body: Any, status: int, param: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_codes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny-llama", prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("some/other")
    assert unknown.value.code == "model_not_found"


def test_harmless_fields_are_ignored(server: Any) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "stop": None,
        "logit_bias": None,
        "temperature": None,
    }
    assert httpx.post(server.url + CHAT, json=body).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_request(server: Any, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    made = server.metric("generation_tokens_total")
    if stream:
        with httpx.stream("POST", server.url + COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert server.metric("num_requests_running") == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + COMPLETIONS, json=body, timeout=0.5)
    deadline = time.monotonic() + 5
    while server.metric("num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("num_requests_running") == 0
    assert server.metric("num_requests_waiting") == 0
    assert server.metric("generation_tokens_total") - made < 4000
