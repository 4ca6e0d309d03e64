"""Attention over pages against a float64 computation from its definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compile import _kernels, cpu
from secateur.pattern import Pattern
from secateur.serve.native.step import Batch
from tests.serve.native.stepping import Array, make_batch

HIDDEN, VOCABULARY, PAGES = 24, 40, 96


@dataclass(frozen=True)
class Case:
    group: int
    kv_heads: int
    head_dim: int
    window: int
    cap: float
    scale: float
    seed: int


cases = st.builds(
    Case,
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 50),
    window=st.one_of(st.just(0), st.integers(1, 70)),
    cap=st.sampled_from([0.0, 0.5, 20.0]),
    scale=st.floats(1 / 64, 0.5, width=32),
    seed=st.integers(0, 99),
)


class OneLayer:
    """One block without rope and with an MLP that adds nothing, in C++ and in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        rows = {"q": case.group * case.kv_heads, "k": case.kv_heads, "v": case.kv_heads}
        self.weights = {
            name: 0.4 * rng.standard_normal((count * case.head_dim, HIDDEN))
            for name, count in rows.items()
        }
        self.weights["o"] = rng.standard_normal((HIDDEN, rows["q"] * case.head_dim))
        self.weights["head"] = rng.standard_normal((VOCABULARY, HIDDEN))
        self.weights["mlp"] = np.zeros((HIDDEN, HIDDEN))
        self.weights = {name: weight.astype(np.float32) for name, weight in self.weights.items()}
        self.embedding = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)

    def decoder(self, cache_type: str) -> Any:
        case, ones = self.case, np.ones(HIDDEN, np.float32)
        parts = {}
        for name, weight in self.weights.items():
            packed = cpu.pack(weight, None, weight.shape, Pattern(), "fp32")  # type: ignore[arg-type]
            parts[name] = (packed._native, False, None)
        made = _kernels.decoder(
            layers=[(case.group * case.kv_heads, case.kv_heads, HIDDEN)],
            hidden=HIDDEN,
            head_dim=case.head_dim,
            vocabulary=VOCABULARY,
            max_length=10_000,
            epsilon=1e-6,
            attention_scale=case.scale,
            attention_cap=case.cap,
            logit_cap=0.0,
            embedding_scale=1.0,
            activation="silu",
            ropes=[],
            embedding=self.embedding.view(np.uint8),
            embedding_type="fp32",
            norm=ones,
            head=parts["head"],
            cache_type=cache_type,
            pages=PAGES,
        )
        made.add_layer(
            qkv=[parts["q"], parts["k"], parts["v"]],
            output=parts["o"],
            gate_up=[parts["mlp"], parts["mlp"]],
            down=parts["mlp"],
            attention_norm=ones,
            after_attention=None,
            mlp_norm=ones,
            after_mlp=None,
            query_norm=None,
            key_norm=None,
            rope=-1,
            window=case.window,
        )
        return made

    def logits(self, text: list[int], kind: str = "fp32") -> Array:
        """In float64, but for keys and values as a cache of a type holds them."""
        case, x = self.case, self.embedding[text].astype(np.float64)

        def normed(rows: Array) -> Array:
            return rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + 1e-6)

        q, k, v = (
            (normed(x) @ self.weights[name].T.astype(np.float64)).reshape(
                len(text), -1, case.head_dim
            )
            for name in "qkv"
        )
        k, v = rounded(k, kind), rounded(v, kind)
        mixed = np.zeros(q.shape)
        for i in range(len(text)):
            first = max(0, i - case.window + 1) if case.window else 0
            for head in range(q.shape[1]):
                scores = k[first : i + 1, head // case.group] @ q[i, head] * case.scale
                if case.cap:
                    scores = case.cap * np.tanh(scores / case.cap)
                weights = np.exp(scores - scores.max())
                mixed[i, head] = weights @ v[first : i + 1, head // case.group] / weights.sum()
        x = x + mixed.reshape(len(text), -1) @ self.weights["o"].T
        result: Array = normed(x) @ self.weights["head"].T
        return result


def rounded(x: Array, kind: str) -> Array:
    """Keys or values ``[tokens, heads, head_dim]`` as a cache of a type holds them."""
    if kind == "fp32":
        return x
    if kind == "fp16":
        return x.astype(np.float16).astype(np.float64)
    scale = np.abs(x).max(axis=2, keepdims=True) / 127
    return np.asarray(np.rint(x / scale) * scale)


def call(decoder: Any, batch: Batch) -> Array:
    found: Array = decoder.step(
        batch.tokens, batch.starts, batch.positions, batch.tables, batch.wanted
    )
    return found.copy()


@settings(max_examples=60, deadline=None)
@given(case=cases, lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_prompts_and_next_tokens_see_what_they_should(case: Case, lengths: list[int]) -> None:
    layer, rng = OneLayer(case), np.random.default_rng(case.seed)
    texts = [rng.integers(0, VOCABULARY, length + 1).tolist() for length in lengths]
    places = iter(rng.permutation(PAGES).tolist())
    tables = [[next(places) for _ in range(-(-len(text) // 16))] for text in texts]
    decoder, start = layer.decoder("fp32"), [len(text) // 3 for text in texts]
    long = [i for i, at in enumerate(start) if at]
    if long:  # the first third alone, then all of the rest but one, then the last ones
        pieces = [texts[i][: start[i]] for i in long]
        call(decoder, make_batch(pieces, [0] * len(long), [tables[i] for i in long], []))
    rest = [text[at:-1] for text, at in zip(texts, start, strict=True)]
    some = [i for i, piece in enumerate(rest) if piece]
    count = sum(len(rest[i]) for i in some)
    found = call(
        decoder,
        make_batch(
            [rest[i] for i in some],
            [start[i] for i in some],
            [tables[i] for i in some],
            [*range(count)],
        ),
    )
    right = [layer.logits(text) for text in texts]
    wanted = np.concatenate([right[i][start[i] : -1] for i in some])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    last = make_batch(
        [text[-1:] for text in texts],
        [len(text) - 1 for text in texts],
        tables,
        [*range(len(texts))],
    )
    np.testing.assert_allclose(call(decoder, last), [rows[-1] for rows in right], atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(case=cases, length=st.integers(1, 60), kind=st.sampled_from(["fp16", "int8"]))
def test_smaller_types_round_keys_and_values_once(case: Case, length: int, kind: str) -> None:
    layer, rng = OneLayer(case), np.random.default_rng(case.seed)
    text = rng.integers(0, VOCABULARY, length).tolist()
    batch = make_batch([text], [0], [[*range(-(-length // 16))]], [*range(length)])
    error = np.abs(call(layer.decoder(kind), batch) - layer.logits(text, kind))
    # The median: one in thousands lies between two numbers, and fp32 rounds it the other way.
    assert np.median(error) < 3e-4


def test_every_instruction_set_agrees() -> None:
    layer = OneLayer(Case(group=3, kv_heads=2, head_dim=37, window=20, cap=3.0, scale=0.3, seed=1))
    text = np.random.default_rng(0).integers(0, VOCABULARY, 50).tolist()
    batch = make_batch([text], [0], [[3, 2, 1, 0]], [*range(50)])
    before = cpu.isa()
    try:
        for name in cpu.isas():
            cpu.use_isa(name)
            for kind in ("fp32", "fp16", "int8"):
                error = np.abs(call(layer.decoder(kind), batch) - layer.logits(text, kind))
                assert np.median(error) < 1e-5
                assert error.max() < (1e-4 if kind == "fp32" else 0.1)
    finally:
        cpu.use_isa(before)
