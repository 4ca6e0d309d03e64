"""/v1/chat/completions, /tokenize, /detokenize and the small pages of a real server."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import secateur

NAME = "tiny-llama"
MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "jump over the dog"},
]


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**given | fields)


def rendered(tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return text


def test_chat_is_a_completion_of_the_template(client: openai.OpenAI, tokenizer: Any) -> None:
    answer = chat(client)
    plain = client.completions.create(
        model=NAME, prompt=rendered(tokenizer), max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.usage == plain.usage


def test_forms_of_content(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "jump over "}, {"type": "text", "text": "the dog"}]
    same = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    expected = chat(client).choices[0].message.content
    assert chat(client, messages=same).choices[0].message.content == expected


def test_length_fields(client: openai.OpenAI) -> None:
    short = chat(client, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2).choices[0]
    entries = answer.logprobs.content
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    joined = b"".join(bytes(entry.bytes) for entry in entries)
    assert joined.decode(errors="replace").startswith(answer.message.content)
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1, "seed": 4, "logprobs": True}])
def test_a_stream_says_the_same(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = chat(client, **fields)
    text = [""] * len(whole.choices)
    entries: list[list[Any]] = [[] for _ in whole.choices]
    roles: list[str] = []
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **fields):
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles.append(choice.delta.role)
            if choice.logprobs:
                entries[choice.index] += choice.logprobs.content
        usage = chunk.usage
    assert text == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * len(whole.choices)
    assert usage == whole.usage
    if "logprobs" in fields:
        assert entries == [choice.logprobs.content for choice in whole.choices]


def test_tokenize_and_back(server: Any, tokenizer: Any) -> None:
    text = "fox 你好 😀<|im_end|>"
    got = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    ids = tokenizer(text).input_ids
    assert got == {"count": len(ids), "max_model_len": 4096, "tokens": ids}
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json()
    assert back == {"prompt": text}
    got = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert got["tokens"] == tokenizer(rendered(tokenizer)).input_ids


def test_small_pages(server: Any, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "secateur"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/version").json() == {"version": secateur.__version__}
    assert "engine: " in server.ready


def test_metrics(server: Any, client: openai.OpenAI) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "request_prompt_tokens_count")
    before = [server.metric(name) for name in names]
    ends = 'request_success_total{finished_reason="length",model_name="tiny-llama"}'
    page = httpx.get(f"{server.url}/metrics").text
    finished = float(page.split(f"vllm:{ends} ")[1].split("\n")[0])
    answer = chat(client, n=2, extra_body={"ignore_eos": True})
    after = [server.metric(name) for name in names]
    assert after[0] - before[0] == 2 * answer.usage.prompt_tokens  # each choice reads the prompt
    assert after[1] - before[1] == answer.usage.completion_tokens == 24
    assert after[2] - before[2] == 2
    page = httpx.get(f"{server.url}/metrics").text
    assert float(page.split(f"vllm:{ends} ")[1].split("\n")[0]) == finished + 2
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_generation_tokens",
    ):
        samples = families[f"vllm:{name}"].samples
        assert all(sample.labels["model_name"] == NAME for sample in samples)
