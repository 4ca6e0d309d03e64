"""What the native engine reads from config.json, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.errors import ModelError
from secateur.serve.native.config import FAMILIES, obstacle, read_architecture
from secateur.serve.native.model import NativeModel
from secateur.serve.native.rope import make_rope

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "vocab_size": 50,
}


def write(directory: Path, **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"} | config))
    return directory


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mixtral"}, "model type 'mixtral' is none of llama, mistral"),
        ({"model_type": "gemma3"}, "model type 'gemma3'"),
        ({"model_type": None}, "model type None"),
        ({"hidden_act": "relu2"}, "activation 'relu2' is none of silu"),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "activation 'relu'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su' is none of default"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn"}}, "a phi3 with rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' has no 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "has no 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "a llama with a partial_rotary_factor of 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised by 'gptq'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirectional"),
        ({"vocab_size": None}, "config.json has no 'vocab_size'"),
    ],
)
def test_what_the_engine_cannot_run_is_named(
    config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    assert why in (obstacle(write(tmp_path, **config)) or "")
    with pytest.raises(ModelError, match="the native engine cannot run") as refused:
        NativeModel.open(tmp_path)
    assert why in refused.value.what
    assert "--engine transformers" in refused.value.fix


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    for text, why in (("[", "not valid JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=why):
            obstacle(tmp_path)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        obstacle(tmp_path / "nowhere")
    for wrong in (
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"num_key_value_heads": 5},
        {"head_dim": 4000},
        {"head_dim": "16"},
        {"model_type": "gemma2", "layer_types": ["full_attention"]},
    ):
        with pytest.raises(ModelError, match="is not a config of"):
            read_architecture(write(tmp_path, **wrong))


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(family, **SIZES)
    found = read_architecture(write(tmp_path, model_type=family))
    head_dim = getattr(config, "head_dim", None) or 16
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 12
    window = getattr(config, "sliding_window", None) or 0
    assert found.head_dim == head_dim
    assert {own.kv_heads for own in found.sizes} == {config.num_key_value_heads}
    assert found.epsilon == config.rms_norm_eps
    assert found.tied == config.tie_word_embeddings
    assert found.windows == tuple(window if kind.startswith("s") else 0 for kind in kinds)
    assert found.logit_cap == (getattr(config, "final_logit_softcapping", None) or 0)
    scale = getattr(config, "query_pre_attn_scalar", head_dim) ** -0.5
    assert found.attention_scale == pytest.approx(scale)
    parameters = config.rope_parameters
    nested = "full_attention" in parameters
    for layer, own in enumerate(found.layer_ropes):
        if family == "smollm3" and not config.no_rope_layers[layer]:
            assert own == -1
            continue
        theta = (parameters[kinds[layer]] if nested else parameters)["rope_theta"]
        assert found.ropes[own].frequencies[1] == pytest.approx(theta ** (-2 / head_dim))


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    ],
)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], width: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 50000.0, **parameters},
    )
    right, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    complete = {"max_position_embeddings": 2048, **config.rope_parameters}
    found = make_rope({"original_max_position_embeddings": 2048, **complete}, width)
    np.testing.assert_allclose(found.frequencies, right.numpy(), rtol=1e-6)
    assert found.factor == pytest.approx(factor)


def test_generation_config_names_the_last_tokens(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path)).eos_token_ids == frozenset()
    assert read_architecture(write(tmp_path, eos_token_id=3)).eos_token_ids == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert read_architecture(write(tmp_path, eos_token_id=3)).eos_token_ids == {4, 5}
