"""A model for the native engine: its weights in the kernels' layouts, its KV cache, its step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from secateur.compile import cpu
from secateur.errors import ModelError, UsageError
from secateur.serve.native.config import Architecture, read_architecture
from secateur.serve.native.step import Batch, Floats
from secateur.serve.native.weights import Weights

KvType = Literal["fp32", "fp16", "int8"]

PAGE_TOKENS = 16
_KV_BYTES = 1 << 30  # unless asked otherwise; memory is taken as pages are written


class NativeModel:
    """See `secateur.serve.native.step.StepModel`."""

    page_tokens = PAGE_TOKENS

    def __init__(self, decoder: Any, weights: Weights, architecture: Architecture, pages: int) -> None:
        self._decoder, self._weights = decoder, weights
        self.vocabulary_size = architecture.vocabulary
        self.eos_token_ids = architecture.eos_token_ids
        self.max_length = min(architecture.max_length, pages * PAGE_TOKENS)
        self.pages = pages
        self.description = ""

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        threads: int | None = None,
        kv_type: KvType = "fp16",
        kv_bytes: int | None = None,
    ) -> NativeModel:
        architecture = read_architecture(directory)
        weights = Weights.open(directory)
        if threads is not None:
            cpu.set_threads(threads)
        pages = max(1, (kv_bytes or _KV_BYTES) // page_bytes(architecture, kv_type))
        decoder = _build(architecture, weights, kv_type, pages)
        return cls(decoder, weights, architecture, pages)

    def step(self, batch: Batch) -> Floats:
        logits: Floats = self._decoder.step(
            batch.tokens, batch.starts, batch.positions, batch.tables, batch.wanted
        )
        return logits

    def close(self) -> None:
        self._decoder = None


def page_bytes(architecture: Architecture, kv_type: KvType) -> int:
    """Bytes of a page in all layers and heads."""
    width = {"fp32": 4, "fp16": 2, "int8": 1}[kv_type]
    chunks = -(-architecture.head_dim // PAGE_TOKENS)
    own = (architecture.head_dim + chunks * PAGE_TOKENS) * PAGE_TOKENS * width
    own += 2 * PAGE_TOKENS * 4 if kv_type == "int8" else 0
    return -(-own // 64) * 64 * architecture.kv_heads * architecture.layers


def _build(a: Architecture, weights: Weights, kv_type: KvType, pages: int) -> Any:
    from secateur.compile import _kernels

    offset = 1.0 if a.family.gemma else 0.0
    embedding, kind = weights.table("model.embed_tokens.weight", (a.vocabulary, a.hidden))
    head = "model.embed_tokens.weight" if a.tied else "lm_head.weight"
    decoder = _kernels.decoder(
        hidden=a.hidden,
        intermediate=a.intermediate,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        vocabulary=a.vocabulary,
        layers=a.layers,
        max_length=min(a.max_length, pages * PAGE_TOKENS),
        epsilon=a.epsilon,
        attention_scale=a.attention_scale,
        attention_cap=a.attention_cap,
        logit_cap=a.logit_cap,
        embedding_scale=a.embedding_scale,
        activation=a.activation,
        ropes=[(rope.frequencies, rope.factor) for rope in a.ropes],
        embedding=embedding,
        embedding_type=kind,
        norm=weights.vector("model.norm.weight", a.hidden, offset),
        head=weights.head(head, (a.vocabulary, a.hidden)),
        cache_type=kv_type,
        pages=pages,
    )
    for index in range(a.layers):
        decoder.add_layer(**_layer(a, weights, index, offset))
    return decoder


def _layer(a: Architecture, weights: Weights, index: int, offset: float) -> dict[str, Any]:
    prefix = f"model.layers.{index}."
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim

    def linear(name: str, rows: int, columns: int) -> Any:
        return weights.linear(prefix + name, (rows, columns), name in a.biases)

    def norm(name: str, length: int, there: bool = True) -> Floats | None:
        return weights.vector(f"{prefix}{name}.weight", length, offset) if there else None

    if a.family.fused:
        qkv = [linear("self_attn.qkv_proj", queries + 2 * keys, a.hidden)]
        gate_up = [linear("mlp.gate_up_proj", 2 * a.intermediate, a.hidden)]
    else:
        rows = {"q": queries, "k": keys, "v": keys}
        qkv = [linear(f"self_attn.{part}_proj", rows[part], a.hidden) for part in "qkv"]
        gate_up = [linear(f"mlp.{part}_proj", a.intermediate, a.hidden) for part in ("gate", "up")]
    four = a.family.gemma
    return {
        "qkv": qkv,
        "output": linear("self_attn.o_proj", a.hidden, queries),
        "gate_up": gate_up,
        "down": linear("mlp.down_proj", a.hidden, a.intermediate),
        "attention_norm": norm("input_layernorm", a.hidden),
        "after_attention": norm("post_attention_layernorm", a.hidden, four),
        "mlp_norm": norm(
            "pre_feedforward_layernorm" if four else "post_attention_layernorm", a.hidden
        ),
        "after_mlp": norm("post_feedforward_layernorm", a.hidden, four),
        "query_norm": norm("self_attn.q_norm", a.head_dim, a.family.head_norms),
        "key_norm": norm("self_attn.k_norm", a.head_dim, a.family.head_norms),
        "rope": a.layer_ropes[index],
        "window": a.windows[index],
    }
