"""Every family and rope type: the steps' logits are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.serve.native.model import NativeModel
from tests.serve.native.stepping import random_steps, random_texts, reference, save_random

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"sliding_window": 13, "query_pre_attn_scalar": 20, "num_hidden_layers": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 20, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 6, "head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 11}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 18}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 34}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
    "gemma2": (
        "gemma2",
        GEMMA | {"head_dim": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": ("gemma3_text", GEMMA | {"head_dim": 16, "sliding_window_pattern": 2}),
    "gemma3-linear": (
        "gemma3_text",
        GEMMA
        | {
            "head_dim": 16,
            "final_logit_softcapping": 6.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 17}),
    "phi3-partial": ("phi3", {"head_dim": 20, "partial_rotary_factor": 0.4}),
    "rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "rope-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}),
    "rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "rope-yarn": ("llama", {"rope_parameters": YARN}),
    "rope-yarn-scales": (
        "qwen3",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}},
    ),
    "rope-yarn-factor": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
}


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = MODELS[request.param]
    return save_random(tmp_path_factory.mktemp("models") / request.param, family, **settings)


def test_logits_are_those_of_transformers(directory: Path) -> None:
    rng = np.random.default_rng(0)
    texts = random_texts(rng, 101, [70, 1, 37, 16])
    wanted = reference(directory, texts)
    with NativeModel.open(directory, kv_type="fp32", kv_bytes=1 << 22) as model:
        for found, right in zip(random_steps(model, texts, rng), wanted, strict=True):
            np.testing.assert_allclose(found, right, atol=1e-4)
