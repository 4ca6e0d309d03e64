"""Blocks of different sizes: written, read, and computed alike by both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile import FORMATS, write_dense
from secateur.errors import ModelError
from secateur.layer_sizes import LayerSizes, read_layer_sizes, with_layer_sizes
from secateur.model import load_causal_lm
from secateur.prune import prune_model
from secateur.recipe import Calibration, Prune
from secateur.serve.native.config import read_architecture
from secateur.serve.native.model import NativeModel
from tests.serve.native.stepping import random_steps, random_texts, reference

COMMON = LayerSizes(4, 2, 48)
# Other groups of query heads, more KV heads than at first, the least there can be.
SIZES = [LayerSizes(2, 1, 16), LayerSizes(4, 4, 48), LayerSizes(6, 3, 64), LayerSizes(1, 1, 4)]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "smollm3", "mistral"]


@pytest.fixture(scope="module")
def uneven(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A random model of a family with blocks of `SIZES`, as transformers builds and saves it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("uneven")
            changes: dict[str, Any] = {"num_hidden_layers": len(SIZES), "head_dim": 16}
            if family == "smollm3":
                changes["no_rope_layers"] = [1, 0, 1, 1]
            wide = make_model(folder / "wide", family, **changes)
            config = json.loads((wide / "config.json").read_text()) | {"head_dim": 16}
            config = with_layer_sizes(config, COMMON, SIZES)
            (wide / "config.json").write_text(json.dumps(config))
            settings = transformers.AutoConfig.from_pretrained(str(wide))
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
            model.save_pretrained(folder / family)
            transformers.AutoTokenizer.from_pretrained(wide).save_pretrained(folder / family)
            made[family] = folder / family
        return made[family]

    return get


LAYER = st.builds(
    lambda kv, group, width: LayerSizes(kv * group, kv, width),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 64),
)


@given(common=LAYER, sizes=st.lists(LAYER, min_size=1, max_size=12))
def test_what_is_written_is_read(common: LayerSizes, sizes: list[LayerSizes]) -> None:
    config = with_layer_sizes({"hidden_size": 48, "head_dim": 16}, common, sizes)
    config = json.loads(json.dumps(config))
    top = LayerSizes(*(config[key] for key in list(config)[2:5]))
    assert read_layer_sizes(config, top, config["num_hidden_layers"]) == sizes
    if len(set(sizes)) == 1 and 48 % sizes[0].heads == 0:
        assert "per_layer_config" not in config


@pytest.mark.parametrize(
    "wrong",
    [
        {"0": {"skip": ["attention"]}},
        {"9": {"intermediate_size": 4}},
        {"0": {"intermediate_size": 0}},
        {"0": {"num_attention_heads": 3}},
        {"0": {"num_key_value_heads": "2"}},
    ],
)
def test_other_differences_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="per_layer_config"):
        read_layer_sizes({"per_layer_config": wrong}, COMMON, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_engine_computes_what_transformers_does(
    family: str, uneven: Callable[[str], Path]
) -> None:
    path = uneven(family)
    assert list(read_architecture(path).sizes) == SIZES
    layers = load_causal_lm(path, torch.float32).model.layers
    assert [layer.mlp.down_proj.in_features for layer in layers] == [
        own.intermediate for own in SIZES
    ]
    rng = np.random.default_rng(0)
    texts = random_texts(rng, 258, [40, 9, 21])
    with NativeModel.open(path, kv_type="fp32", kv_bytes=1 << 20) as model:
        found = random_steps(model, texts, rng)  # ragged batches, shuffled pages
    for mine, right in zip(found, reference(path, texts), strict=True):
        assert np.abs(mine - right).max() < 1e-3 * np.abs(right).max()


def test_it_generates_with_a_cache_and_saves_itself(
    uneven: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_causal_lm(uneven("llama"), torch.float32)
    ids = torch.arange(5, 15)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    model.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(tmp_path / "saved", torch.float32)
    assert torch.equal(again.generate(ids, **options), expected)
    model.set_attn_implementation("eager")  # reaches every block
    assert torch.equal(model.generate(ids, **options), expected)


def test_smaller_matrices_sparsity_and_integers_compose(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """adapt, then 2:4, then int8, opened by both engines."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    dense = make_model(tmp_path / "dense", num_hidden_layers=3, **sizes)
    text = Calibration(data=str(text_file), samples=4, length=32)
    steps = {"adapt.step": 0.1, "adapt.amplitude": 0.15}
    adapt = {"method": "adapt+lsq", "pattern": "30%", "multiple": 4, "settings": steps}
    prune_model(str(dense), tmp_path / "a", Prune.model_validate(adapt), text, quiet=True)
    sparse = Prune.model_validate({"method": "wanda", "pattern": "2:4", "strict": True})
    prune_model(str(tmp_path / "a"), tmp_path / "b", sparse, text, quiet=True)
    FORMATS["packed"].write(tmp_path / "b", tmp_path / "c", values="int8", quantize="rtn")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["per_layer_config"]
    write_dense(tmp_path / "c", tmp_path / "twin", values="fp32")
    text_ids = list(range(3, 33))
    right = reference(tmp_path / "twin", [text_ids])[0]
    options: dict[str, Any] = {"kv_type": "fp32", "kv_bytes": 1 << 20, "head": "fp32"}
    with NativeModel.open(tmp_path / "c", activations="fp32", **options) as model:
        assert any(use.layout != "dense" and use.values == "int8" for use in model.report)
        found = random_steps(model, [text_ids], np.random.default_rng(0))[0]
    assert np.abs(found - right).max() < 1e-4 * np.abs(right).max()
    with torch.no_grad():
        packed = load_causal_lm(tmp_path / "c", torch.float32)(torch.tensor([text_ids])).logits[0]
    error = np.square(packed.numpy() - right).mean() / np.square(right).mean()
    assert np.sqrt(error) < 0.15  # activations of eight bits, in a model of random weights
