"""From each orphaned form to the weights that it stands for, and what a reader refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint import Checkpoint, write_json
from secateur.compile import pack_model, read_packed, write_dense
from secateur.compile.marlin24 import Marlin24, pack, unpack
from secateur.compile.orphan import OrphanCheckpoint
from secateur.errors import ModelError, UsageError
from secateur.orphans import recognise
from secateur.recipe import Calibration
from tests.compile.conftest import rewrite
from tests.compile.orphans import FORMS, write_orphan

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj"
E5M2 = torch.float8_e5m2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form (NAME) beside the model that was pruned for it (NAME.pruned), in bf16."""
    folder = tmp_path_factory.mktemp("orphans")
    for name in FORMS:
        write_orphan(folder, name)
    return folder


@pytest.fixture
def orphan(home: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a form in one file, to be changed."""

    def copy(name: str) -> Path:
        made = tmp_path / name
        shutil.copytree(home / name, made)
        whole: Tensors = {}
        for file in sorted(made.glob("model-*.safetensors")):
            whole |= load_file(file)
            file.unlink()
        (made / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(whole, made / "model.safetensors", metadata={"format": "pt"})
        return made

    return copy


def set_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    write_json(directory / "config.json", config)


def plain(directory: Path) -> Tensors:
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        if "mask" not in file.name
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", FORMS)
def test_packed_holds_what_dense_decodes_to(home: Path, tmp_path: Path, name: str) -> None:
    report = pack_model(home / name, tmp_path / "packed")
    write_dense(home / name, tmp_path / "dense", values="fp32")
    packed, dense = read_packed(tmp_path / "packed"), plain(tmp_path / "dense")
    before = plain(home / f"{name}.pruned")
    assert packed.names() == sorted(dense) == sorted(before)
    kept = {"24-int8": "int8", "bitmask-int8": "int8", "marlin-int4": "int4", "24-fp8": "fp8"}
    assert report.values == (kept | {"marlin-int8": "int8"}).get(name, "bf16")
    for tensor in packed.names():
        own, whole = packed.load(tensor), dense[tensor]
        assert torch.equal(own.float(), whole), tensor
        if report.quantize is None:
            assert torch.equal(own, before[tensor]), tensor
    pattern = FORMS[name][0]
    assert {str(packed.layers[n].pattern) for n in report.layers} <= {pattern, "dense"}
    pruned = [n for n in report.layers if not n.endswith(("k_proj", "v_proj"))]
    assert len(pruned) == 10
    assert {str(packed.layers[n].pattern) for n in pruned} == {pattern}
    assert set(report.kept_dense) == {
        f"model.layers.{block}.self_attn.{letter}_proj" for block in (0, 1) for letter in "kv"
    }
    assert report.notes[0].startswith("read from ")


@pytest.mark.parametrize(
    ("name", "most"),
    [("24-fp8", 0.04), ("24-int8", 0.01), ("marlin-int4", 0.16), ("marlin-int8", 0.02)],
)
def test_what_quantising_costs(home: Path, name: str, most: float) -> None:
    before, after = plain(home / f"{name}.pruned"), OrphanCheckpoint(home / name)
    for tensor in after.names():
        if after.decoded(tensor):
            lost = (after.load(tensor) - before[tensor].float()).norm() / before[tensor].norm()
            assert 1e-4 < lost < most, tensor
        else:
            assert torch.equal(after.load(tensor), before[tensor])


def test_zeros_in_place(home: Path, tmp_path: Path) -> None:
    """A checkpoint of another program, in shards: no manifest, no masks."""
    for name in ("24", "bitmask", "old"):
        source = shutil.copytree(home / f"{name}.pruned", tmp_path / name)
        (source / "manifest.json").unlink()
        (source / "masks.safetensors").unlink()
        report = pack_model(source, tmp_path / f"{name}.packed")
        assert {layer.pattern for layer in report.layers.values()} == {FORMS[name][0]}
        assert len(report.layers) == 10
        packed, before = read_packed(tmp_path / f"{name}.packed"), plain(source)
        for tensor in packed.names():
            assert torch.equal(packed.load(tensor), before[tensor])


def test_a_dense_model_is_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"no pruned layer to pack; .* 0.0 % of its weights are"):
        pack_model(tiny, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


# What a reader of each era may find in config.json.
def old_place(config: dict[str, Any]) -> None:
    config["compression_config"] = config.pop("quantization_config")


def at_the_top(config: dict[str, Any]) -> None:
    described = config.pop("quantization_config").get("sparsity_config", {})
    config["sparsity_config"] = described | {"format": "sparse_bitmask"}


def nothing(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def empty_parts(config: dict[str, Any]) -> None:
    config["quantization_config"] |= {"sparsity_config": {}, "transform_config": {}}


@pytest.mark.parametrize("change", [old_place, at_the_top, nothing, empty_parts])
@pytest.mark.parametrize("name", ["24", "bitmask", "old", "marlin-int4"])
def test_the_config_of_any_era(
    orphan: Callable[[str], Path], home: Path, name: str, change: Any
) -> None:
    made = orphan(name)
    set_config(made, change)
    assert recognise(Checkpoint(made)) is not None
    config = OrphanCheckpoint(made).config
    assert not any("config" in key for key in config)
    one, other = OrphanCheckpoint(made), OrphanCheckpoint(home / name)
    assert one.names() == other.names()
    for tensor in one.names():
        assert torch.equal(one.load(tensor), other.load(tensor))


def test_recognising(home: Path, tiny: Path, tmp_path: Path, orphan: Callable[[str], Path]) -> None:
    said = {name: recognise(Checkpoint(home / name)) for name in FORMS}
    assert said["24"] == "sparse-24-bitmask (compressed-tensors 0.13.0)"
    assert said["24-fp8"] == "sparse-24-bitmask, float-quantized (compressed-tensors 0.13.0)"
    assert said["bitmask-int8"] == "sparse-bitmask, int-quantized (compressed-tensors 0.13.0)"
    assert said["old"] == "sparse-bitmask (compressed-tensors 0.8.1)"
    assert said["marlin-int4"] == "marlin-24 (compressed-tensors 0.13.0)"
    assert recognise(Checkpoint(tiny)) is None
    assert recognise(Checkpoint(home / "24.pruned")) is None
    pack_model(home / "24", tmp_path / "packed")
    assert recognise(Checkpoint(tmp_path / "packed")) is None
    zeros = shutil.copytree(tiny, tmp_path / "zeros")
    sparsity = {"format": "dense", "sparsity_structure": "2:4"}
    set_config(
        zeros, lambda config: config.update(quantization_config={"sparsity_config": sparsity})
    )
    assert recognise(Checkpoint(zeros)) == "dense weights with zeros in place (compressed-tensors)"
    sparsity["sparsity_structure"] = "unstructured"
    set_config(
        zeros, lambda config: config.update(quantization_config={"sparsity_config": sparsity})
    )
    assert recognise(Checkpoint(zeros)) is None


def test_gptq_names(orphan: Callable[[str], Path], tmp_path: Path) -> None:
    made = orphan("marlin-int4")
    right = OrphanCheckpoint(made)
    expected = {tensor: right.load(tensor) for tensor in right.names()}

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            base = name.removesuffix(".weight_packed")
            ends = (".weight_packed", ".meta", ".scale_packed")
            parts = Marlin24(*(tensors.pop(base + end).numpy() for end in ends))
            packed = pack(*unpack(parts), gptq=True)
            tensors[base + ".B_24"] = torch.from_numpy(packed.weight)
            tensors[base + ".B_meta"] = torch.from_numpy(packed.meta)
            tensors[base + ".s"] = torch.from_numpy(packed.scales)
            tensors[base + ".workspace"] = torch.zeros(16, dtype=torch.int32)

    rewrite(made, rename, "model.safetensors")
    gptq = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": 128}
    set_config(made, lambda config: config.update(quantization_config=gptq))
    found = OrphanCheckpoint(made)
    assert found.form == "GPTQ marlin-24"
    assert found.notes == ["10 scales and shapes of activations and kernels left out"]
    for tensor in expected:
        assert torch.equal(found.load(tensor), expected[tensor]), tensor
    assert pack_model(made, tmp_path / "packed").values == "int4"


# What cannot keep its integers, and why.
LOSSES: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("24-int8", lambda t: t[f"{UP}.compressed"][3, 2].fill_(-128), "it holds -128"),
    (
        "24-int8",
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float() * 1.001}),
        "no numbers of fp16",
    ),
    (
        "24-int8",
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].repeat(1, 4)}),
        "each 8 columns have a scale",
    ),
    (
        "24-int8",
        lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(48, 1, dtype=torch.int8)}),
        "not symmetric",
    ),
    (
        "24-fp8",
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].repeat(1, 4)}),
        "each 8 columns have a scale",
    ),
    ("24-fp8", lambda t: t[f"{UP}.weight_scale"][3].neg_(), "negative or above 2^119"),
    (
        "24-fp8",
        lambda t: t.update({f"{UP}.compressed": t[f"{UP}.compressed"].float().to(E5M2)}),
        "its values are of e5m2",
    ),
    (
        "24-fp8",
        lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(48, 1, dtype=torch.int8)}),
        "not symmetric",
    ),
    (
        "24-fp8",
        lambda t: t.update(
            {f"{UP}.compressed": t[f"{UP}.compressed"].float().clamp(-99, 99).to(torch.int8)}
        ),
        "13 of 14 quantised linears are fp8 and the others integers",
    ),
]


@pytest.mark.parametrize(("name", "change", "said"), LOSSES)
def test_what_cannot_stay_integers_becomes_floats_and_is_told(
    orphan: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    change: Callable[[Tensors], object],
    said: str,
) -> None:
    made = orphan(name)
    rewrite(made, lambda tensors: (change(tensors), None)[1], "model.safetensors")
    report = pack_model(made, tmp_path / "packed")
    assert report.values == "bf16"
    assert said in report.notes[1]
    assert "relative error" in report.notes[2]
    stored, packed = load_file(made / "model.safetensors"), read_packed(tmp_path / "packed")
    scale, values = stored[f"{UP}.weight_scale"].double(), by_hand(stored, UP).double()
    values -= stored.get(f"{UP}.weight_zero_point", torch.zeros(1, 1))
    exact = values * scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    assert torch.equal(packed.load(f"{UP}.weight"), exact.float().to(torch.bfloat16))


def by_hand(stored: Tensors, name: str) -> torch.Tensor:
    """The values of a 2:4 linear, one bit at a time."""
    rows, columns = stored[f"{name}.shape"].flatten().tolist()
    values, bits = stored[f"{name}.compressed"].float(), stored[f"{name}.bitmask"].tolist()
    dense = torch.zeros(rows, columns)
    for row in range(rows):
        left = iter(values[row].tolist())
        for column in range(columns):
            if bits[row][column // 8] >> column % 8 & 1:
                dense[row, column] = next(left)
    return dense


def test_int4_with_minus_eight_becomes_int8(orphan: Callable[[str], Path], tmp_path: Path) -> None:
    made = orphan("marlin-int4")

    def reach(tensors: Tensors) -> None:
        ends = (".weight_packed", ".meta", ".scale_packed")
        parts = Marlin24(*(tensors[UP + end].numpy() for end in ends))
        values, scales, bits = unpack(parts)
        values[values == -7] = -8
        assert (values == -8).any()
        packed = pack(values, scales, bits)
        tensors[f"{UP}.weight_packed"] = torch.from_numpy(packed.weight)

    rewrite(made, reach, "model.safetensors")
    report = pack_model(made, tmp_path / "packed")
    assert (report.values, report.quantize) == ("int8", "kept")
    assert any("-8" in note for note in report.notes)
    packed, right = read_packed(tmp_path / "packed"), OrphanCheckpoint(made)
    for name in packed.layers:
        assert torch.equal(packed.load(f"{name}.weight"), right.load(f"{name}.weight"))


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


DAMAGES: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("24", drop(f"{UP}.shape"), f"no tensor '{UP}.shape'"),
    ("24", drop(f"{UP}.bitmask"), f"tensor '{UP}.compressed' belongs to no weight"),
    ("24", lambda t: t.update({f"{UP}.weight": torch.ones(48, 32)}), "in two forms"),
    ("24", lambda t: t[f"{UP}.bitmask"][0].fill_(255), f"'{UP}.bitmask' is damaged"),
    ("24", lambda t: t.update({f"{UP}.shape": torch.tensor([[32], [48]])}), "is damaged"),
    ("24-int8", drop(f"{UP}.weight_scale"), "is torch.int8, but has no scale"),
    (
        "24-int8",
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(47, 1)}),
        "does not fit a weight of shape",
    ),
    (
        "24-int8",
        lambda t: t[f"{UP}.weight_scale"][5].fill_(float("nan")),
        f"'{UP}.weight_scale' holds NaN",
    ),
    (
        "24-int8",
        lambda t: t.update({f"{UP}.weight_g_idx": torch.arange(32)}),
        "belongs to no weight",
    ),
    (
        "24-fp8",
        lambda t: t[f"{UP}.compressed"].view(torch.uint8)[0, 0].fill_(127),
        f"'{UP}.weight' holds NaN",
    ),
    ("marlin-int4", drop(f"{UP}.scale_packed"), f"no tensor '{UP}.scale_packed'"),
    ("marlin-int4", drop(f"{UP}.meta"), "belongs to no weight"),
    (
        "marlin-int4",
        lambda t: t.update({f"{UP}.meta": t[f"{UP}.meta"][1:]}),
        f"'{UP}.weight_packed' is damaged",
    ),
    (
        "marlin-int4",
        lambda t: t.update({f"{UP}.scale_packed": t[f"{UP}.scale_packed"].bfloat16()}),
        f"'{UP}.weight_packed' is damaged",
    ),
    ("marlin-int4", lambda t: t[f"{UP}.meta"].fill_(0x5555), f"'{UP}.meta'"),
    (
        "marlin-int4",
        lambda t: t[f"{UP}.scale_packed"].fill_(float("inf")),
        f"'{UP}.scale_packed' holds NaN or infinity",
    ),
    ("24", lambda t: t.update({f"{UP}.shape": torch.tensor([[1 << 45], [4]])}), "it says"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_damaged_checkpoints(
    orphan: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    damage: Callable[[Tensors], object],
    said: str,
) -> None:
    made = orphan(name)
    rewrite(made, lambda tensors: (damage(tensors), None)[1], "model.safetensors")
    with pytest.raises(ModelError) as told:
        pack_model(made, tmp_path / "packed")
    assert said in told.value.what
    assert list(tmp_path.iterdir()) == [made]


def test_an_orphan_writes_no_text_of_its_own(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write its own calibration text"):
        pack_model(
            home / "24", tmp_path / "out", values="int4", calibration=Calibration(data="self")
        )
    report = pack_model(home / "24-fp8", tmp_path / "out", values="int4", quantize="rtn")
    assert (report.values, len(report.layers)) == ("int4", 14)
    assert not any("became floats" in note for note in report.notes)


def test_rotations_are_refused(orphan: Callable[[str], Path]) -> None:
    made = orphan("24")
    transform = {"config_groups": {"u": {"type": "hadamard"}}}
    set_config(made, lambda c: c["quantization_config"].update(transform_config=transform))
    with pytest.raises(ModelError, match="transform_config"):
        OrphanCheckpoint(made)
