"""Packed models in transformers: loading, saving, dequantizing, refusing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from secateur.compile import cpu, pack_model, write_dense
from secateur.errors import ModelError
from secateur.model import load_causal_lm
from secateur.serve import load
from secateur.serve.hf import SparseLinear, kernel_report
from tests.serve.hf_models import LAYER, MODELS, TOKENS, by_hand, close, logits, same, stored

BITS, VALUES = f"{LAYER}.weight_bitmask", f"{LAYER}.weight_values"


@pytest.fixture
def packed(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of the packed "odd" model to damage."""
    return Path(shutil.copytree(made["odd"][1], tmp_path / "packed"))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_logits_are_those_of_the_pruned_model(
    made: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: Any,
    kernels: str,
) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", kernels)
    pruned, packed = made[name]
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(pruned, dtype=dtype)
    assert close(model, dense)
    if kernels == "off":
        assert torch.equal(logits(model), logits(dense))
    assert model.dtype == dense.dtype
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == (12 if name == "tied" else 14)
    for module in sparse:
        assert (module.weight is None) == (kernels == "on")
        assert module.weight_bitmask.dtype == torch.uint8
        assert module.weight_values.dtype == dense.dtype
        assert not module.weight_values.requires_grad


@pytest.mark.parametrize("values", ["bf16", "fp16"])
def test_converted_values_equal_the_pruned_model_in_that_type(
    made: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: Any
) -> None:
    pruned, folder = made["qwen2"][0], tmp_path / "packed"
    pack_model(pruned, folder, values=values)
    write_dense(folder, tmp_path / "dense")
    wide = load_causal_lm(folder, torch.float32)  # computes in fp32, reads the narrow values
    assert close(wide, load_causal_lm(tmp_path / "dense", torch.float32))
    assert [use.values for use in kernel_report(wide)] == [values]
    monkeypatch.setenv("SECATEUR_KERNELS", "off")
    model = load_causal_lm(folder)
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[values]
    assert torch.equal(logits(model), logits(load_causal_lm(pruned, model.dtype)))


@pytest.mark.parametrize("name", list(MODELS))
def test_save_and_reload_keeps_the_packed_form(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    packed = made[name][1]
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    assert same(stored(packed), stored(tmp_path / "again"))
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (packed, tmp_path / "again")
    )
    assert before == after
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(again))


def test_a_cast_model_saves_what_it_holds(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(made["llama"][1], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(again))
    with pytest.raises(ModelError, match="not all fp32"):
        model.to(torch.float64).save_pretrained(tmp_path / "wide")


def test_the_bare_decoder_saves_and_loads(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    pruned, packed = made["llama"]
    bare = AutoModel.from_pretrained(packed)
    with torch.no_grad():
        dense = AutoModel.from_pretrained(pruned)(TOKENS).last_hidden_state
        wanted = bare(TOKENS).last_hidden_state
        assert torch.allclose(wanted, dense, rtol=1e-4, atol=1e-5)
        bare.save_pretrained(tmp_path / "bare")
        again = AutoModel.from_pretrained(tmp_path / "bare")
        assert torch.equal(again(TOKENS).last_hidden_state, wanted)


@pytest.mark.parametrize("how", ["method", "flag"])
@pytest.mark.parametrize("name", ["qwen2", "tied"])
def test_dequantized_models_are_ordinary(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, how: str
) -> None:
    pruned, packed = made[name]
    if how == "method":
        model = AutoModelForCausalLM.from_pretrained(packed)
        model.dequantize()
    else:
        config = AutoConfig.from_pretrained(packed)
        config.quantization_config["dequantize"] = True
        model = AutoModelForCausalLM.from_pretrained(packed, config=config)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert type(model.get_submodule(LAYER)) is nn.Linear
    dense = AutoModelForCausalLM.from_pretrained(pruned)
    assert torch.equal(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert same(stored(pruned), stored(tmp_path / "dense"))


def test_dequantize_to_another_type(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    pruned, packed = made["qwen2"]
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")  # leaves config.dtype a string
    model.dequantize(dtype=torch.bfloat16)
    assert kernel_report(model) == []
    wanted = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(wanted))
    other = AutoModelForCausalLM.from_pretrained(packed)
    other.save_pretrained(tmp_path / "again")
    other.dequantize()
    assert other.dtype == torch.float32


def test_the_engine_says_what_computes(
    made: dict[str, tuple[Path, Path]],
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = Path(shutil.copytree(made["llama"][1], tmp_path / "packed"))
    tokenizer.save_pretrained(packed)
    threads, own = torch.get_num_threads(), cpu.threads()
    try:
        load(packed, engine="transformers", threads=2).close()
        assert cpu.threads() == 2
    finally:
        torch.set_num_threads(threads)
        cpu.set_threads(own)
    said = (
        f"serve: 14 packed linears: CPU kernels ({cpu.isa()}, 2 threads), layout 2:4, fp32 values"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_kernels_follow_torchs_threads(
    made: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", kernels)
    before, wanted = cpu.threads(), torch.get_num_threads()
    cpu.set_threads(wanted + 1)
    try:
        load_causal_lm(made["llama"][1])
        assert cpu.threads() == (wanted if kernels == "on" else wanted + 1)
    finally:
        cpu.set_threads(before)


def test_a_model_can_be_compiled_without_a_break(made: dict[str, tuple[Path, Path]]) -> None:
    model = load_causal_lm(made["qwen2"][1])
    with torch.no_grad():
        wanted = model(TOKENS, use_cache=False).logits
        traced = torch.compile(model, backend="eager", fullgraph=True)
        found = traced(TOKENS, use_cache=False).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_generation_and_printing(made: dict[str, tuple[Path, Path]]) -> None:
    pruned, packed = made["llama"]
    model, dense = load_causal_lm(packed), load_causal_lm(pruned)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(TOKENS)
    written = model.generate(TOKENS, attention_mask=mask, **asked)
    assert torch.equal(written, dense.generate(TOKENS, attention_mask=mask, **asked))
    assert "SparseLinear(in_features=64, out_features=48, bias=False, pattern=2:4)" in str(model)


@pytest.mark.parametrize(
    ("tensor", "change", "said"),
    [
        (BITS, lambda t: t.pop(BITS), "no tensor"),
        (VALUES, lambda t: t.pop(VALUES), "no tensor"),
        (BITS, lambda t: t.update({BITS: t[BITS] & ~1}), "bits are set for 792 values"),
        (BITS, lambda t: t.update({BITS: t[BITS] | 128}), "past the last column"),
        (BITS, lambda t: t.update({BITS: t[BITS].to(torch.int8)}), "type I8, not U8"),
        (VALUES, lambda t: t.update({VALUES: t[VALUES].half()}), "type F16, not F32"),
        (VALUES, lambda t: t.update({VALUES: t[VALUES][1:]}), "shape"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    packed: Path, tensor: str, change: Any, said: str
) -> None:
    by_hand.rewrite(packed, change, "model.safetensors")
    with pytest.raises(ModelError, match=said) as refused:
        AutoModelForCausalLM.from_pretrained(packed)
    assert tensor in refused.value.what


@pytest.mark.parametrize(
    ("layer", "entry", "said"),
    [
        (LAYER, {"shape": [36, 48]}, "row 0 keeps 0 of the columns 44 to 47|shape"),
        ("model.layers.7.mlp.down_proj", {}, "no tensor 'model.layers.7"),
        (LAYER, {"pattern": "2:5"}, "does not fit"),
    ],
)
def test_a_config_that_lies_is_refused(packed: Path, layer: str, entry: Any, said: str) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    layers[layer] = layers[LAYER] | entry
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        AutoModelForCausalLM.from_pretrained(packed)


def test_layers_that_the_model_does_not_have(packed: Path) -> None:
    state = stored(packed)
    config = AutoConfig.from_pretrained(packed)
    config.num_hidden_layers = 1
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.\S+' .* no such module"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


ORDERS = {
    "secateur first": "import secateur; from transformers import AutoModelForCausalLM as A",
    "transformers first": "from transformers import AutoModelForCausalLM as A; import secateur",
    "plug-in, twice": "import importlib, secateur.serve.hf as hf; importlib.reload(hf); "
    "from transformers import AutoModelForCausalLM as A",
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_import_orders(made: dict[str, tuple[Path, Path]], order: str) -> None:
    open_it = f"model = A.from_pretrained({str(made['llama'][1])!r})"
    script = f"{ORDERS[order]}; {open_it}; print(type(model.model.layers[0].mlp.up_proj))"
    ran = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "<class 'secateur.serve.linear.SparseLinear'>"


def test_import_secateur_alone_is_cheap() -> None:
    script = "import secateur, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
