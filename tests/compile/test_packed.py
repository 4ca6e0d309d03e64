"""The reader: every damage is refused, by the name of the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.compile import pack_model, read_packed
from secateur.errors import ModelError
from tests.compile.conftest import rewrite

LAYER = "model.layers.1.mlp.down_proj"
FILE = "model.safetensors"
BITS, VALUES = f"{LAYER}.weight_bitmask", f"{LAYER}.weight_values"
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def packed(pruned: Path, tmp_path: Path) -> Path:
    pack_model(pruned, tmp_path / "packed")
    return tmp_path / "packed"


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def swap_bit(bits: torch.Tensor) -> torch.Tensor:
    """Move one kept position of row 0 to another group: same count, other pattern."""
    bits[0, 0] |= 0x0F
    bits[0, 1] &= 0xF0
    return bits


def move_row(bits: torch.Tensor) -> torch.Tensor:
    """Take two positions from row 0 and give them to row 1: same count in all."""
    bits[0, 0] &= 0xF0
    bits[1, 0] |= 0x0F
    return bits


@pytest.mark.parametrize(
    ("tensor", "change", "said"),
    [
        (BITS, edit(BITS, lambda bits: bits & ~1), "bits are set for 792 values"),
        (BITS, edit(BITS, swap_bit), "2:4: row 0 keeps 4 of the columns 0 to 3"),
        (BITS, edit(BITS, move_row), "row 0 keeps 20, not 22"),
        (BITS, edit(BITS, lambda bits: bits | 128), "row 0 has bits set past the last column"),
        (BITS, edit(BITS, lambda bits: bits[:-1]), r"shape \(35, 6\), not \(36, 6\)"),
        (BITS, edit(BITS, lambda bits: bits.to(torch.int8)), "type I8, not U8"),
        (BITS, lambda tensors: tensors.pop(BITS), "no tensor"),
        (VALUES, lambda tensors: tensors.pop(VALUES), "no tensor"),
        (VALUES, edit(VALUES, lambda values: values.half()), "type F16, not F32"),
        (VALUES, edit(VALUES, lambda values: values[:, 1:]), r"shape \(36, 21\), not \(36, 22\)"),
        (VALUES, edit(VALUES, lambda values: values.flatten()), r"shape \(792,\)"),
    ],
)
def test_damaged_tensors(packed: Path, tensor: str, change: Change, said: str) -> None:
    rewrite(packed, change, "model.safetensors")
    with pytest.raises(ModelError, match=said) as refused:
        read_packed(packed).load(f"{LAYER}.weight")
    assert tensor in refused.value.what
    assert "secateur compile" in refused.value.fix


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("shape", [36, 48], "2:4: row 0 keeps 0 of the columns 44 to 47"),
        ("shape", [0, 44], "greater than 0"),
        ("shape", [36, 42], "2:4 does not fit: 42 inputs"),
        ("kept", 40, "36 rows of 22 are not 40"),
        ("kept", 36 * 44 + 1, "1585 kept of 1584"),
        ("per_row", None, "shape"),
        ("pattern", "1:4", "1:4: row 0 keeps 2"),
        ("pattern", "2:4@4x1", "shape"),
        ("pattern", "2of4", "'2of4' is not understood"),
        ("colour", "red", "colour"),
    ],
)
def test_a_config_that_lies(packed: Path, key: str, value: object, said: str) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][LAYER][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as refused:
        read_packed(packed).load(f"{LAYER}.weight")
    assert LAYER in refused.value.what


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format_version", 4, "format_version: Input should be 1, 2 or 3"),
        ("format_version", 2, "values: .* version 2 has int8 or int4, not fp32"),
        ("values", "int4", "values: .* version 1 has fp32, bf16 or fp16, not int4"),
        ("group_size", 64, "group_size: .* have no groups"),
        ("layers", 3, "layers: "),
        ("more", 1, "more: "),
    ],
)
def test_versions_and_keys_that_are_not_known(
    packed: Path, key: str, value: object, said: str
) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"quantization_config: {said}"):
        read_packed(packed)


def test_version_1_lists_no_dense_linear(packed: Path) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    change = {"pattern": "dense", "kept": 36 * 44, "per_row": 44}
    config["quantization_config"]["layers"][LAYER] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"layers: .*{LAYER} is dense"):
        read_packed(packed)


@pytest.mark.parametrize("end", [".weight", ".weight_scales"])
def test_tensors_that_nothing_calls_for(packed: Path, end: str) -> None:
    rewrite(packed, lambda tensors: tensors.update({LAYER + end: torch.ones(2)}), FILE)
    with pytest.raises(ModelError, match=f"has a tensor '{LAYER}{end}', which fp32 values"):
        read_packed(packed)


@pytest.mark.parametrize("values", ["fp32", "bf16", "fp16"])
def test_pieces_are_the_stored_bits(pruned: Path, tmp_path: Path, values: Any) -> None:
    pack_model(pruned, tmp_path / "other", values=values)
    model, stored = read_packed(tmp_path / "other"), load_file(tmp_path / "other" / FILE)
    pieces = model.pieces(LAYER)
    assert (pieces.layer, pieces.value_type) == (model.layers[LAYER], values)
    assert (pieces.scales, pieces.group_size) == (None, None)
    assert pieces.bitmask is not None
    assert torch.equal(torch.from_numpy(pieces.bitmask), stored[BITS])
    assert pieces.values.dtype == ("float32" if values == "fp32" else "uint16")
    assert torch.equal(torch.from_numpy(pieces.values).view(stored[VALUES].dtype), stored[VALUES])


def test_pieces_are_checked(packed: Path) -> None:
    rewrite(packed, edit(BITS, swap_bit), FILE)
    with pytest.raises(ModelError, match="2:4: row 0 keeps 4"):
        read_packed(packed).pieces(LAYER)


def test_a_truncated_file(packed: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"truncated: tensor 'model\.\S+' is cut off"):
        read_packed(packed)


def test_a_dense_directory_is_no_packed_one(pruned: Path) -> None:
    with pytest.raises(ModelError, match="is not a packed model"):
        read_packed(pruned)


def test_tensors_are_read_when_asked_for(packed: Path) -> None:
    rewrite(packed, edit(BITS, lambda bits: bits & ~1), "model.safetensors")
    model = read_packed(packed)  # headers only: the damage is in the data of one layer
    assert model.load("model.layers.0.mlp.down_proj.weight").shape == (36, 44)
    assert model.mask("model.layers.0.mlp.down_proj").sum() == 36 * 22
    assert model.load("model.norm.weight").shape == (36,)
