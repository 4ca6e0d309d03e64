"""Packed models of fp8 values in transformers: scales stay fp32, whatever the model's type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.compile import pack_model, write_dense
from secateur.serve.hf import kernel_report
from tests.serve.hf_models import LAYER, close, logits, stored

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def pair(
    made: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model of odd shapes with fp8 values, and its dense twin in fp32."""
    folder = tmp_path_factory.mktemp("fp8")
    pack_model(made["odd"][0], folder / "packed", values="fp8", quantize="rtn")
    write_dense(folder / "packed", folder / "dense")
    return folder / "packed", folder / "dense"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_logits_are_those_of_the_dense_twin(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernels: str
) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", kernels)
    packed, twin = pair
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(twin, dtype=dtype)
    if kernels == "off":
        assert torch.equal(logits(model), logits(dense))
    else:
        assert close(model, dense)
        (use,) = kernel_report(model)
        assert (use.values, use.activations) == ("bf16", "fp32")
        assert "fp8 values times the scales of their rows, exactly" in str(use)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cast", ["loaded", "moved"])
def test_values_and_scales_are_saved_as_they_were(
    pair: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype, cast: str
) -> None:
    before = stored(pair[0])
    loaded = dtype if cast == "loaded" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=loaded).to(dtype)
    module = model.get_submodule(LAYER)
    assert (module.weight_scales.dtype, module.dtype) == (torch.float32, dtype)
    model.save_pretrained(tmp_path / "again")
    after = stored(tmp_path / "again")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name.endswith(("_values", "_scales", "_bitmask")):
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(again.get_submodule(LAYER).dense(), module.dense())
