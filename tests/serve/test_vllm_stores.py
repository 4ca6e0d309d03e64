"""The linears that the vLLM plug-in reads are the dense ones of the checkpoint; without vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from secateur.compile import pack_model
from secateur.compile.orphan import OrphanCheckpoint
from secateur.compile.packed import PackedModel
from secateur.compile.shard import dense
from secateur.errors import ModelError
from secateur.orphans import compression_of, is_sparse_form
from secateur.serve.vllm.stores import Orphan, Packed, Store, dense_pieces
from tests.compile.orphans import FORMS, write_orphan

MAPPER = SimpleNamespace(
    apply_dict=lambda names: {f"inner.{name}": value for name, value in names.items()}
)


def read(store: Store, tensors: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    return torch.from_numpy(dense(store.read(part, tensors, torch.float32)))


@pytest.mark.parametrize("name", [form for form in FORMS if form != "old"])
def test_an_orphan(name: str, tmp_path: Path) -> None:
    path = write_orphan(tmp_path, name)
    checkpoint = OrphanCheckpoint(path)
    assert is_sparse_form(compression_of(checkpoint._files.config))
    store = Orphan(path).rename(MAPPER)
    assert "inner.model.layers.1.mlp.up_proj" in store.names
    stored = set(checkpoint._files.names())
    for part in store.names:
        linear = part.removeprefix("inner.")
        assert {linear + end for end in store.tensors(part)} <= stored
        assert torch.equal(read(store, {}, part), checkpoint.load(f"{linear}.weight").float())


def test_a_form_without_a_place_in_vllm(tmp_path: Path) -> None:
    """Before 0.9 norms and embeddings were compressed, too."""
    with pytest.raises(ModelError, match="no place") as caught:
        Orphan(write_orphan(tmp_path, "old"))
    assert "secateur compile" in caught.value.fix


@pytest.mark.parametrize("values", [None, "int8", "int4"])
def test_a_packed_model(values: str | None, tmp_path: Path) -> None:
    orphan = write_orphan(tmp_path, "24")
    pack_model(orphan, tmp_path / "p", values=values, quantize="rtn")  # type: ignore[arg-type]
    model, store = PackedModel(tmp_path / "p"), None
    tensors = {}
    for file in (tmp_path / "p").glob("*.safetensors"):
        tensors |= load_file(file)
    store = Packed(model.config)
    for part in store.names:
        expected = model.load(f"{part}.weight", torch.float32)
        assert torch.equal(read(store, tensors, part), expected)
        assert store.shape(part) == tuple(expected.shape)
    with pytest.raises(ModelError, match="no tensor"):
        store.read(store.names[0], {}, torch.float32)


def test_a_dense_part() -> None:
    weight = torch.randn(5, 7).bfloat16()
    assert torch.equal(torch.from_numpy(dense(dense_pieces("x", weight))), weight.float())


@pytest.mark.parametrize(
    ("compression", "sparse"),
    [
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, True),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, False),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            True,
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
            False,
        ),
        ({"quant_method": "gptq", "checkpoint_format": "marlin_24"}, True),
        ({"quant_method": "gptq"}, False),
        ({"quant_method": "secateur"}, False),
    ],
)
def test_which_configs_are_taken_from_others(compression: dict[str, object], sparse: bool) -> None:
    assert is_sparse_form(compression) == sparse
