"""Packed models of int8 and int4 values in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.compile import pack_model, write_dense
from secateur.errors import ModelError, UsageError
from secateur.serve.hf import SparseLinear, kernel_report
from tests.serve.hf_models import LAYER, by_hand, close, logits, same, stored

INTEGERS = [("llama", "int8", 64), ("blocks", "int4", 32), ("tied", "int4", 128)]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", "off")


@pytest.fixture(scope="module")
def quantised(
    made: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Models with integer values as (packed, its dense twin in fp32); "tied" has dense linears."""
    folder = tmp_path_factory.mktemp("integers")
    pairs = {}
    for name, values, size in INTEGERS:
        packed = folder / f"{name}-packed"
        pack_model(made[name][0], packed, values=values, group_size=size, quantize="rtn")
        write_dense(packed, folder / f"{name}-dense")
        pairs[name] = (packed, folder / f"{name}-dense")
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
@pytest.mark.parametrize(("name", "values", "size"), INTEGERS)
def test_integer_values_on_a_dense_copy_compute_as_their_dense_twin(
    quantised: dict[str, tuple[Path, Path]],
    no_kernels: None,
    name: str,
    values: str,
    size: int,
    dtype: Any,
) -> None:
    packed, twin = quantised[name]
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(twin, dtype=dtype)
    assert model.dtype == dense.dtype
    assert torch.equal(logits(model), logits(dense))
    sparse = {path: m for path, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert len(sparse) == 14
    for path, module in sparse.items():
        kind = torch.int8 if values == "int8" else torch.uint8
        assert (module.weight_values.dtype, module.group_size) == (kind, size)
        assert module.weight_scales is not None
        assert module.weight_scales.dtype == torch.float16
        assert (module.weight_bitmask is None) == (name == "tied" and path.endswith("k_proj"))
        assert module.weight is not None
        assert module.weight.dtype == dense.dtype


@pytest.mark.parametrize(("name", "values", "size"), INTEGERS)
def test_integer_values_on_the_kernels(
    quantised: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, values: str, size: int
) -> None:
    packed, twin = quantised[name]
    dense = AutoModelForCausalLM.from_pretrained(twin)
    rounded = AutoModelForCausalLM.from_pretrained(packed)
    assert {use.activations for use in kernel_report(rounded)} == {"int8"}
    assert close(rounded, dense, 0.05)
    assert not close(rounded, dense)
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config["activations"] = "fp32"
    model = AutoModelForCausalLM.from_pretrained(packed, config=config)
    assert {use.activations for use in kernel_report(model)} == {"fp32"}
    assert close(model, dense)
    model.save_pretrained(tmp_path / "again")
    written, old = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "again", packed)
    )
    assert written == old  # a choice of this process, not of the file
    config.quantization_config["activations"] = "int4"
    with pytest.raises(UsageError, match="activations 'int4' are not known"):
        AutoModelForCausalLM.from_pretrained(packed, config=config)


@pytest.mark.parametrize(("name", "values", "size"), INTEGERS)
def test_integer_values_are_saved_as_they_were(
    quantised: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, values: str, size: int
) -> None:
    packed, _ = quantised[name]
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
        again = tmp_path / str(dtype)
        model.save_pretrained(again)
        before, after = stored(packed), stored(again)
        assert before.keys() == after.keys()
        for tensor, old in before.items():
            cast = dtype if old.dtype == torch.float32 else old.dtype  # scales, integers: kept
            assert torch.equal(after[tensor], old.to(cast)), tensor
            assert after[tensor].dtype == cast
        config, old_config = (
            json.loads((folder / "config.json").read_text())["quantization_config"]
            for folder in (again, packed)
        )
        assert config == old_config
        assert (config["format_version"], config["values"], config["group_size"]) == (
            2,
            values,
            size,
        )
        reloaded = AutoModelForCausalLM.from_pretrained(again)
        assert torch.equal(logits(model), logits(reloaded))
    if name == "llama":  # one file: equal to the byte
        model = AutoModelForCausalLM.from_pretrained(packed)
        model.save_pretrained(tmp_path / "same")
        file = "model.safetensors"
        assert (tmp_path / "same" / file).read_bytes() == (packed / file).read_bytes()


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_casting_a_quantised_model_leaves_its_scales(
    quantised: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernels: str,
) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", kernels)
    packed, _ = quantised["llama"]
    model = AutoModelForCausalLM.from_pretrained(packed).to(torch.bfloat16)
    wanted = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    wanted.model.rotary_emb.to(torch.bfloat16)  # .to casts these, too
    assert torch.equal(logits(model), logits(wanted))
    module = model.get_submodule(LAYER)
    assert (module.weight_scales.dtype, module.dtype) == (torch.float16, torch.bfloat16)
    assert torch.equal(module.weight_scales, stored(packed)[f"{LAYER}.weight_scales"])
    assert torch.equal(module.dense(), wanted.get_submodule(LAYER).dense())
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again")[f"{LAYER}.weight_scales"].dtype == torch.float16


@pytest.mark.parametrize(("name", "values", "size"), INTEGERS)
def test_dequantized_integers_are_ordinary(
    quantised: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, values: str, size: int
) -> None:
    packed, twin = quantised[name]
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.dequantize()
    assert type(model.get_submodule(LAYER)) is nn.Linear
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert same(stored(twin), stored(tmp_path / "dense"))


@pytest.mark.parametrize(
    ("end", "change", "said"),
    [
        ("values", lambda old: torch.full_like(old, -128), "is -128, below -127"),
        ("scales", lambda old: -old - 1, "negative or not finite"),
        ("scales", lambda old: old.float(), "type F32, not F16"),
    ],
)
def test_damaged_integers_are_refused_by_name(
    quantised: dict[str, tuple[Path, Path]], tmp_path: Path, end: str, change: Any, said: str
) -> None:
    packed = Path(shutil.copytree(quantised["llama"][0], tmp_path / "packed"))
    tensor = f"{LAYER}.weight_{end}"
    by_hand.rewrite(packed, lambda t: t.update({tensor: change(t[tensor])}), "model.safetensors")
    with pytest.raises(ModelError, match=said) as refused:
        AutoModelForCausalLM.from_pretrained(packed)
    assert tensor in refused.value.what
