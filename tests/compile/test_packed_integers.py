"""The reader of format version 2: every damage is refused, by the name of the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compile import pack_model, read_packed
from secateur.errors import ModelError
from tests.compile.conftest import prune_by_hand, rewrite

LAYER, DENSE = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"
BITS, VALUES, SCALES = (f"{LAYER}.weight_{end}" for end in ("bitmask", "values", "scales"))
FILE = "model.safetensors"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose down_proj keeps 3 x 21 weights: an odd number, in unequal rows."""
    folder = tmp_path_factory.mktemp("packed")
    pruned = prune_by_hand(folder / "pruned", "50%", hidden=6, inner=21, dense=("k_proj",))
    for values in ("int8", "int4"):
        pack_model(pruned, folder / values, values=values, quantize="rtn", group_size=32)
    return {values: folder / values for values in ("int8", "int4")}


@pytest.fixture
def open_copy(packed_once: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda values: Path(shutil.copytree(packed_once[values], tmp_path / values))


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def put(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("values", "tensor", "change", "said"),
    [
        ("int8", VALUES, edit(VALUES, put(7, -128)), "value 7 is -128, below -127"),
        ("int8", VALUES, edit(VALUES, lambda v: v.view(torch.uint8)), "type U8, not I8"),
        ("int8", VALUES, edit(VALUES, lambda v: v[1:]), r"shape \(62,\), not \(63,\)"),
        ("int4", VALUES, edit(VALUES, put(3, 0x80)), "value 7 is -8, below -7"),
        ("int4", VALUES, edit(VALUES, put(3, 0x08)), "value 6 is -8, below -7"),
        ("int4", VALUES, edit(VALUES, put(31, 0x10)), "unused half of its last byte is 0x10"),
        ("int4", VALUES, edit(VALUES, lambda v: v.view(torch.int8)), "type I8, not U8"),
        ("int4", VALUES, edit(VALUES, lambda v: v[1:]), r"shape \(31,\), not \(32,\)"),
        ("int4", VALUES, lambda t: t.pop(VALUES), "no tensor"),
        ("int8", SCALES, lambda t: t.pop(SCALES), "no tensor"),
        ("int8", SCALES, edit(SCALES, lambda s: s.float()), "type F32, not F16"),
        ("int8", SCALES, edit(SCALES, lambda s: s[:, 0]), r"shape \(6,\), not \(6, 1\)"),
        ("int8", SCALES, edit(SCALES, put(2, -1.0)), "row 2, group 0 is -1: negative"),
        ("int8", SCALES, edit(SCALES, put(2, -0.0)), "row 2, group 0 is -0: negative"),
        ("int4", SCALES, edit(SCALES, put(5, float("nan"))), "row 5, group 0 is nan"),
        ("int4", SCALES, edit(SCALES, put(0, float("inf"))), "row 0, group 0 is inf"),
        ("int4", BITS, edit(BITS, lambda b: b & ~1), "bits are set for 63 values"),
        ("int8", BITS, lambda t: t.pop(BITS), "no tensor"),
    ],
)
def test_damaged_tensors(
    open_copy: Callable[[str], Path], values: str, tensor: str, change: Change, said: str
) -> None:
    directory = open_copy(values)
    assert read_packed(directory).layers[LAYER].kept == 63
    rewrite(directory, change, FILE)
    for read in (
        lambda: read_packed(directory).load(f"{LAYER}.weight"),
        lambda: read_packed(directory).pieces(LAYER),
    ):
        with pytest.raises(ModelError, match=said) as refused:
            read()
        assert tensor in refused.value.what
        assert "secateur compile" in refused.value.fix


@pytest.mark.parametrize("end", [".weight", ".weight_bitmask"])
def test_tensors_that_a_dense_linear_does_not_have(
    open_copy: Callable[[str], Path], end: str
) -> None:
    directory = open_copy("int8")
    extra = torch.ones(6, 1, dtype=torch.uint8)
    rewrite(directory, lambda tensors: tensors.update({DENSE + end: extra}), FILE)
    with pytest.raises(ModelError, match=f"has a tensor '{DENSE}{end}', which int8 values"):
        read_packed(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 1}, "values: .* version 1 has fp32"),
        ({"format_version": 3}, "values: .* version 3 has fp8, not int8"),
        ({"format_version": 4}, "format_version: "),
        ({"values": "bf16"}, "values: .* version 2 has int8 or int4, not bf16"),
        ({"values": "int5"}, "values: "),
        ({"group_size": 16}, "group_size: .* 32, 64 or 128 columns, not 16"),
        ({"group_size": None}, "group_size: .* not None"),
        ({"group_size": 32.0}, "group_size: .* not 32.0"),
        ({"zero_points": True}, "zero_points: "),
    ],
)
def test_configs_that_are_not_known(
    open_copy: Callable[[str], Path], change: dict[str, object], said: str
) -> None:
    path = open_copy("int8") / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"quantization_config: {said}"):
        read_packed(path.parent)
    del config["quantization_config"]["group_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantization_config"):
        read_packed(path.parent)


@pytest.mark.parametrize(
    ("layer", "change", "said"),
    [
        (DENSE, {"per_row": None}, "dense keeps 6 of each row, not None"),
        (DENSE, {"kept": 30, "per_row": 5}, "dense keeps 6 of each row, not 5"),
        (LAYER, {"pattern": "dense"}, "dense keeps 21 of each row"),
        (DENSE, {"pattern": "50%"}, "no tensor"),
        (LAYER, {"shape": [6, 40]}, r"shape \(6, 3\), not \(6, 5\)|shape \(6, 1\), not \(6, 2\)"),
    ],
)
def test_entries_that_lie(
    open_copy: Callable[[str], Path], layer: str, change: dict[str, object], said: str
) -> None:
    path = open_copy("int4") / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][layer] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        read_packed(path.parent)
