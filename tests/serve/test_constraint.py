"""Answers that fit a JSON schema: the grammar alone, the sampler, and both engines over HTTP."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.serve.constraint import ANY_OBJECT, Grammars, SchemaRefused
from secateur.serve.sampling import SamplingParameters, sample
from secateur.serve.text import TextCodec
from secateur.serve.tokenizer import JsonTokenizer

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["x", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def codec(tiny: Path) -> TextCodec:
    return TextCodec(JsonTokenizer(tiny))


@pytest.fixture(scope="module")
def grammars(codec: TextCodec) -> Grammars:
    return Grammars(codec, 325, [0, 2])  # a model with more rows than the tokenizer has tokens


def tokens(mask: np.ndarray[Any, Any]) -> list[int]:
    """The tokens of a mask, bit by bit."""
    return [
        32 * word + bit
        for word in range(len(mask))
        for bit in range(32)
        if int(mask[word]) >> bit & 1
    ]


def test_the_mask_allows_what_can_still_become_valid(grammars: Grammars, codec: TextCodec) -> None:
    """Against brute force: all texts of a small language, and every token after every prefix."""
    words = ["true", "false", "tree"]
    valid = {json.dumps(list(pair), separators=(",", ":")) for pair in product(words, repeat=2)}
    schema = {"type": "array", "items": {"enum": words}, "minItems": 2, "maxItems": 2}
    grammar = grammars.compile(json.dumps(schema))
    random = np.random.default_rng(0)
    text = ""
    constraint = grammar.copy()
    while not constraint.ended:
        mask = constraint.mask()
        assert mask.dtype == np.uint32
        assert mask.shape == (11,)
        allowed = tokens(mask)
        pieces = {token: codec.token_bytes(token).decode(errors="replace") for token in range(320)}
        expected = {
            token
            for token, piece in pieces.items()
            if token not in codec.special and any(one.startswith(text + piece) for one in valid)
        }
        spaces = {token for token in allowed if not pieces[token].strip()}
        assert set(allowed) - spaces == expected
        token = int(random.choice(sorted(expected)))
        constraint.accept(token)
        text += pieces[token]
    assert text in valid
    assert tokens(grammar.mask()) == tokens(grammar.copy().mask())  # the copy went its own way
    with pytest.raises(ValueError, match="grammar failed"):
        grammar.accept(codec.encode("x")[0])


@given(st.integers(0, 2**32))
def test_random_walks_are_valid(grammars: Grammars, codec: TextCodec, seed: int) -> None:
    random = np.random.default_rng(seed)
    constraint, ids = grammars.compile(json.dumps(POINT)), []
    while not constraint.ended:
        token = int(random.choice(tokens(constraint.mask())))
        ids.append(token)
        constraint.accept(token)
    value = json.loads(codec.decode(ids))
    assert 0 <= value["x"] <= 99
    assert type(value["ok"]) is bool
    assert len(value) == 2


@pytest.mark.parametrize(
    "schema",
    ["false", "{", "[]", '{"type": "nope"}', '{"$ref": "file:///etc/passwd"}', '{"pattern": "("}'],
)
def test_schemas_that_cannot_be_followed(grammars: Grammars, schema: str) -> None:
    with pytest.raises(SchemaRefused, match="the schema"):
        grammars.compile(schema)


def test_without_the_library(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SchemaRefused, match=r"secateur\[structured\]"):
        Grammars(codec, 320, [0]).compile(ANY_OBJECT)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=70),
    st.data(),
    st.sampled_from([0.0, 0.7, 1.5]),
)
def test_the_sampler_draws_allowed_tokens_as_if_there_were_no_others(
    logits: list[float], data: st.DataObject, temperature: float
) -> None:
    allowed = sorted(data.draw(st.sets(st.integers(0, len(logits) - 1), min_size=1)))
    mask = np.zeros(-(-len(logits) // 32), dtype=np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    parameters = SamplingParameters(temperature=temperature, top_p=0.9, min_p=0.01)
    row = np.array(logits, dtype=np.float32)
    seed = data.draw(st.integers(0, 999))
    got = sample(row, parameters, [], [], np.random.default_rng(seed), mask)
    alone = sample(row[allowed], parameters, [], [], np.random.default_rng(seed))
    assert got == allowed[alone]


def ask(server: Any, form: Any, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "a point"}], "response_format": form}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body | fields, timeout=60)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_over_http(server: Any, temperature: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    answer = ask(server, form, temperature=temperature, n=3, seed=1, max_tokens=120)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert len(choices) == 3
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]).keys() == {"x", "ok"}


def test_a_constrained_answer_beside_free_ones(server: Any) -> None:
    """A schema changes its own answer only, and the log-probabilities stay the model's."""
    body = {"prompt": "the quick", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    free = httpx.post(url, json=body).json()["choices"][0]["text"]
    form = {"response_format": {"type": "json_object"}, "logprobs": 1, "max_tokens": 1}
    bound = httpx.post(url, json=body | form).json()["choices"][0]
    assert bound["text"].strip() in ("", "{")
    first = httpx.post(url, json=body | {"logprobs": 1}).json()["choices"][0]
    assert (
        bound["logprobs"]["top_logprobs"][0].items() >= first["logprobs"]["top_logprobs"][0].items()
    )
    assert httpx.post(url, json=body).json()["choices"][0]["text"] == free


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}},
        {"type": "xml"},
        "json",
    ],
)
def test_refused_forms(server: Any, form: Any) -> None:
    answer = ask(server, form)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
