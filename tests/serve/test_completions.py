"""/v1/completions of a real server, asked by the official client, against plain torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

PROMPT = "the quick brown fox"
NAME = "tiny-llama"


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": PROMPT, "max_tokens": 24} | fields)


def reference(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (len(ids), vocabulary) in one plain pass."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)


def test_greedy_is_generate(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    answer = complete(client, temperature=0)
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == ids.shape[1] + len(expected)
    assert answer.choices[0].finish_reason == ("stop" if expected[-1] in (0, 2) else "length")


def test_a_long_prompt_in_pieces_is_the_prompt_in_one(client: openai.OpenAI, model: Any) -> None:
    ids = torch.randint(3, 300, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    answer = complete(client, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True)
    table = reference(model, ids)
    got = answer.choices[0].logprobs.token_logprobs
    assert got[0] is None
    expected = [float(table[at - 1, ids[at]]) for at in range(1, len(ids))]
    assert got[1:-1] == pytest.approx(expected, abs=2e-3)
    assert got[-1] == pytest.approx(float(table[-1].max()), abs=2e-3)


def test_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, extra_body={"ignore_eos": True}, user="ignored"
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 5, "n": 3, "logprobs": 2, "echo": True},
        {"seed": 6, "stop": ["e", "qu"]},
        {"seed": 1, "prompt": ["a", "b c"], "n": 2, "top_p": 0.9, "extra_body": {"top_k": 50}},
    ],
)
def test_a_stream_says_the_same(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    text = [""] * len(whole.choices)
    noted: list[list[float | None]] = [[] for _ in whole.choices]
    reasons: list[str | None] = [None] * len(whole.choices)
    usage = None
    stream = complete(client, stream=True, stream_options={"include_usage": True}, **fields)
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            text[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                noted[choice.index] += choice.logprobs.token_logprobs
    assert text == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    if "logprobs" in fields:
        assert noted == [choice.logprobs.token_logprobs for choice in whole.choices]


def test_token_ids_are_as_good_as_text(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    texts = {
        complete(client, prompt=prompt, seed=3).choices[0].text for prompt in (PROMPT, ids, [ids])
    }
    assert len(texts) == 1
    several = complete(client, prompt=[ids, ids[:2]], seed=3)
    assert several.choices[0].text in texts
    assert several.usage.prompt_tokens == len(ids) + 2


def test_a_seed_repeats_whatever_else_runs(client: openai.OpenAI) -> None:
    alone = complete(client, seed=11, n=2)
    assert alone.choices[0].text != alone.choices[1].text
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(complete, client, max_tokens=100) for _ in range(4)]
        again = [pool.submit(complete, client, seed=11, n=2) for _ in range(2)]
        for future in again:
            assert [c.text for c in future.result().choices] == [c.text for c in alone.choices]
        for future in others:
            assert future.result().usage.completion_tokens > 0
    assert complete(client, seed=12).choices[0].text != alone.choices[0].text


def test_stop_strings(client: openai.OpenAI) -> None:
    free = complete(client, seed=1, max_tokens=40, extra_body={"ignore_eos": True})
    text = free.choices[0].text
    assert len(text) > 12
    stop = text[8:11]
    cut = complete(client, seed=1, max_tokens=40, stop=stop, extra_body={"ignore_eos": True})
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_stop_token_ids(client: openai.OpenAI, tokenizer: Any) -> None:
    token = tokenizer(" jumps").input_ids[0]
    forced = {"logit_bias": {str(token): 100}, "max_tokens": 5}
    assert complete(client, **forced).choices[0].finish_reason == "length"
    cut = complete(client, **forced, extra_body={"stop_token_ids": [token]})
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("", "stop")
    assert cut.usage.completion_tokens == 1


def test_end_of_sequence_and_ignoring_it(client: openai.OpenAI) -> None:
    forced = {"logit_bias": {"0": 100}, "max_tokens": 5}
    ended = complete(client, **forced)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    ignored = complete(client, **forced, extra_body={"ignore_eos": True})
    assert ignored.choices[0].finish_reason == "length"
    assert ignored.usage.completion_tokens == 5


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    answer = complete(
        client,
        prompt=ids,
        seed=2,
        temperature=0.5,
        echo=True,
        logprobs=3,
        max_tokens=8,
        extra_body={"ignore_eos": True},
    ).choices[0]
    got = answer.logprobs
    assert len(got.tokens) == len(ids) + 8 == len(got.token_logprobs) == len(got.text_offset)
    assert answer.text.startswith(PROMPT)
    names = {}
    for token in range(len(tokenizer)):
        raw = tokenizer.decode([token])
        if "\ufffd" not in raw:
            names[raw] = token
    sequence = [*ids, *(names.get(name, -1) for name in got.tokens[len(ids) :])]
    known = sequence.index(-1) if -1 in sequence else len(sequence)
    table = reference(model, sequence[:known])
    assert got.top_logprobs[0] is None
    for at in range(1, known):
        row = table[at - 1]
        assert got.token_logprobs[at] == pytest.approx(float(row[sequence[at]]), abs=2e-3)
        best = sorted(got.top_logprobs[at].values(), reverse=True)[:3]
        assert best == pytest.approx(torch.topk(row, 3).values.tolist(), abs=2e-3)
    for at in range(len(ids)):
        start = got.text_offset[at]
        assert answer.text[start : start + len(got.tokens[at])] == got.tokens[at]


def test_scoring_only(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    """What evaluation harnesses send for log-likelihoods."""
    ids = tokenizer(PROMPT).input_ids
    answer = complete(client, prompt=[ids, ids], max_tokens=0, echo=True, logprobs=1)
    table = reference(model, ids)
    for choice in answer.choices:
        assert choice.text == PROMPT
        assert choice.finish_reason == "length"
        expected = [float(table[at - 1, ids[at]]) for at in range(1, len(ids))]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-3)
        for at, top in enumerate(choice.logprobs.top_logprobs[1:], 1):
            greedy = choice.logprobs.token_logprobs[at] == max(top.values())
            assert greedy == (int(table[at - 1].argmax()) == ids[at])
    assert answer.usage.completion_tokens == 0
    assert complete(client, max_tokens=0, echo=True).choices[0].text == PROMPT
