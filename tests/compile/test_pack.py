"""pack_model: what it writes, what it refuses, and that it never leaves half a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur.compile.pack as pack
from secateur.artifact import Manifest
from secateur.checkpoint import Checkpoint
from secateur.compile import FORMATS, pack_model, read_packed
from secateur.errors import ModelError, UsageError
from tests.compile.conftest import PATTERNS, brute_bits, prune_by_hand, rewrite

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip(tmp_path: Path, pattern: str) -> None:
    source = prune_by_hand(tmp_path / "pruned", pattern, dtype=torch.bfloat16)
    for values in ("fp32", "bf16", "fp16", None):
        check_round_trip(source, tmp_path / f"packed-{values}", pattern, values)


def check_round_trip(source: Path, output: Path, pattern: str, values: Any) -> None:
    report = pack_model(source, output, values=values)
    dense, packed = load_file(source / "model.safetensors"), read_packed(output)
    stored = load_file(output / "model.safetensors")
    masks = load_file(source / "masks.safetensors")
    wanted = TYPES[values or "bf16"]
    assert report.values == (values or "bf16")
    assert packed.names() == sorted(dense)
    for name, tensor in dense.items():
        loaded = packed.load(name)
        assert loaded.dtype == wanted
        assert torch.equal(loaded, tensor.to(wanted)), name
    for name, layer in packed.layers.items():
        rows, columns = dense[f"{name}.weight"].shape
        assert str(layer.pattern) == pattern
        assert layer.shape == (rows, columns)
        assert torch.equal(stored[f"{name}.weight_bitmask"], masks[f"{name}.weight"])
        assert torch.equal(
            brute_bits(packed.mask(name), layer.pattern.rows), masks[f"{name}.weight"]
        )
        if layer.pattern.is_nm:
            assert layer.per_row == columns * layer.pattern.n // layer.pattern.m
        size = stored[f"{name}.weight_bitmask"].nbytes + stored[f"{name}.weight_values"].nbytes
        assert report.layers[name].packed_bytes == size
    assert len(packed.layers) == 14


def test_what_stands_in_the_output(pruned: Path, tmp_path: Path) -> None:
    report = pack_model(pruned, tmp_path / "packed", values="fp16")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((pruned / "config.json").read_text()) | {"dtype": "float16"}
    assert {key: quantization[key] for key in ("quant_method", "format_version", "values")} == {
        "quant_method": "secateur",
        "format_version": 1,
        "values": "fp16",
    }
    assert quantization["layers"][LAYER] == {
        "pattern": "2:4",
        "shape": [36, 44],
        "kept": 36 * 22,
        "per_row": 22,
    }
    manifest = Manifest.read(tmp_path / "packed")
    assert manifest.kind == "packed"
    assert manifest.notes == ["pruned by hand"]
    assert manifest.seed == 3
    assert manifest.recipe == {
        "prune": {"pattern": "2:4"},
        "compile": {"format": "packed", "values": "fp16"},
    }
    assert manifest.source["source"] == {"model": "tiny"}
    assert set(manifest.source["files"]) == {
        "config.json",
        "model.safetensors",
        "masks.safetensors",
    }
    facts = manifest.layers[LAYER]
    assert (facts.dense_bytes, facts.bytes) == (36 * 44 * 2, 36 * 22 * 2 + 36 * 6)
    assert (facts.pattern, facts.sparsity) == ("2:4", 0.5)
    assert set(manifest.files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    assert report.packed_bytes < report.dense_bytes < report.source_bytes
    assert report.linears_dense_bytes == sum(x.dense_bytes for x in report.layers.values())
    assert not (tmp_path / "packed.partial").exists()


def test_two_runs_give_the_same_manifest(pruned: Path, tmp_path: Path) -> None:
    pack_model(pruned, tmp_path / "a")
    pack_model(pruned, tmp_path / "b")
    a, b = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert a == b


def test_shards_keep_their_split(tmp_path: Path) -> None:
    source = prune_by_hand(tmp_path / "pruned", shard="40KB", dense=("v_proj",), tied=True)
    assert len(Checkpoint(source).files) > 2
    report = pack_model(source, tmp_path / "packed")
    packed = read_packed(tmp_path / "packed")
    files = [file.name for file in packed.checkpoint.files]
    assert files == [file.name for file in Checkpoint(source).files]
    assert set(report.kept_dense) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert "model.layers.0.self_attn.v_proj.weight" in packed.checkpoint
    original = Checkpoint(source)
    for name in packed.names():
        assert torch.equal(packed.load(name), original.load(name))
    facts = Manifest.read(tmp_path / "packed").layers["model.layers.0.self_attn.v_proj"]
    assert (facts.kept_dense, facts.bytes) == ("asked", 48 * 48 * 4)


def test_rounding_is_to_nearest_even(pruned: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.weight"

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        kept = tensors[name].nonzero()
        tensors[name][tuple(kept[0])] = 1 + 2**-8  # halfway: the even neighbour is 1
        tensors[name][tuple(kept[1])] = 1 + 3 * 2**-8  # halfway: the even neighbour is 1 + 2^-6

    rewrite(pruned, tie, "model.safetensors")
    pack_model(pruned, tmp_path / "packed", values="bf16")
    values = load_file(tmp_path / "packed" / "model.safetensors")[f"{LAYER}.weight_values"]
    assert values.flatten()[:2].tolist() == [1, 1 + 2**-6]


def _set(name: str, value: float, removed: bool = False) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        where = (tensors[name] == 0) if removed else (tensors[name] != 0)
        tensors[name][tuple(where.nonzero()[4])] = value

    return change


def _mask(edit: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = edit(tensors[f"{LAYER}.weight"].clone())

    return change


@pytest.mark.parametrize(
    ("file", "change", "values", "said"),
    [
        ("model", _set(f"{LAYER}.weight", float("nan")), None, "holds NaN"),
        ("model", _set("model.norm.weight", float("nan")), None, "'model.norm.weight' holds NaN"),
        ("model", _set(f"{LAYER}.weight", -70000.0), "fp16", "holds 70000, .* too large for fp16"),
        ("model", _set(f"{LAYER}.weight", 0.25, True), None, "is 0.25 at row 0, .* mask removes"),
        ("model", lambda t: t.pop(f"{LAYER}.weight"), None, f"no tensor '{LAYER}.weight'"),
        ("masks", lambda t: t.pop(f"{LAYER}.weight"), None, f"no mask '{LAYER}.weight'"),
        ("masks", _mask(lambda bits: bits[:-1]), None, f"'{LAYER}.weight' .* 35 rows"),
        ("masks", _mask(lambda bits: bits[:, :-1]), None, f"'{LAYER}.weight' .* 6 bytes, not 5"),
        ("masks", _mask(lambda bits: bits.to(torch.int8)), None, f"'{LAYER}.weight' .* uint8"),
        ("masks", _mask(lambda bits: bits.flatten()), None, f"'{LAYER}.weight' .* 1 axes"),
        ("masks", _mask(lambda bits: bits | 1), None, f"'{LAYER}.weight' .* keeps 3 of"),
        ("masks", _mask(lambda bits: bits | 128), None, f"'{LAYER}.weight' .* past the last"),
        ("masks", lambda t: t.update({"stray.weight": torch.ones(1)}), None, "mask 'stray.weight'"),
    ],
)
def test_contradictions_are_refused_by_name(
    pruned: Path, tmp_path: Path, file: str, change: Any, values: Any, said: str
) -> None:
    rewrite(pruned, change, f"{file}.safetensors")
    with pytest.raises(ModelError, match=said):
        pack_model(pruned, tmp_path / "packed", values=values)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruned"]


def test_infinity_that_was_there_is_no_overflow(pruned: Path, tmp_path: Path) -> None:
    rewrite(pruned, _set(f"{LAYER}.weight", float("inf")), "model.safetensors")
    pack_model(pruned, tmp_path / "packed", values="fp16")


def test_linears_of_mixed_types_need_values(pruned: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].half()

    rewrite(pruned, halve, "model.safetensors")
    with pytest.raises(ModelError, match=f"'{LAYER}.weight' is float16") as refused:
        pack_model(pruned, tmp_path / "packed")
    assert "--values" in refused.value.fix
    pack_model(pruned, tmp_path / "packed", values="fp32")


def test_inputs_that_are_not_pruned_models(pruned: Path, tmp_path: Path) -> None:
    pack_model(pruned, tmp_path / "packed")
    (tmp_path / "packed" / "masks.safetensors").touch()
    with pytest.raises(ModelError, match="is a packed model, not a pruned one"):
        pack_model(tmp_path / "packed", tmp_path / "again")
    (pruned / "masks.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ModelError, match=r"masks\.safetensors cannot be read"):
        pack_model(pruned, tmp_path / "again")
    (pruned / "masks.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no masks\.safetensors"):
        pack_model(pruned, tmp_path / "again")
    with pytest.raises(UsageError, match="value type 'int5' is not known"):
        pack_model(pruned, tmp_path / "again", values="int5")


def test_a_model_without_pruned_layers_is_refused(tmp_path: Path) -> None:
    source = prune_by_hand(tmp_path / "pruned", dense=("proj",))
    with pytest.raises(ModelError, match="no pruned layer"):
        pack_model(source, tmp_path / "packed")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(pack, "write_json", fail)  # after the weights, before the manifest
    with pytest.raises(fault):
        pack_model(pruned, tmp_path / "packed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruned"]
    monkeypatch.undo()
    pack_model(pruned, tmp_path / "packed", values="bf16")


def test_an_existing_output_is_kept_unless_told(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_model(pruned, tmp_path / "packed")
    with pytest.raises(UsageError, match="already exists"):
        pack_model(pruned, tmp_path / "packed", values="bf16")
    pack_model(pruned, tmp_path / "packed", values="bf16", overwrite=True)
    assert read_packed(tmp_path / "packed").config.values == "bf16"
    monkeypatch.setattr(pack, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_model(pruned, tmp_path / "packed", values="fp16", overwrite=True)
    assert read_packed(tmp_path / "packed").config.values == "bf16"


def test_formats_name_their_writers() -> None:
    assert FORMATS["packed"].write is pack_model
    assert FORMATS["packed"].description


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_model_that_could_not_be_read_back_is_refused(
    family: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Weights that transformers holds transposed, or fused."""
    from secateur.prune import prune_model
    from secateur.recipe import Calibration, Prune

    dense = make_model(tmp_path / "dense", family)
    prune_model(
        str(dense),
        tmp_path / "out",
        Prune(method="magnitude"),
        Calibration(data="none"),
        quiet=True,
    )
    with pytest.raises(ModelError, match=f"{family} models cannot be packed"):
        pack_model(tmp_path / "out", tmp_path / "packed")
