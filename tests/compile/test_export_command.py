"""Orphans and the forms of other programs as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.artifact import Manifest
from secateur.checkpoint import Checkpoint
from secateur.compile import pack_model, read_packed, write_compressed_tensors, write_marlin24
from secateur.compile.export import round_rows
from secateur.compile.orphan import OrphanCheckpoint
from secateur.recipe import Calibration
from tests.compile.conftest import prune_by_hand
from tests.compile.orphans import write_orphan

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_from_an_orphan_and_back(tmp_path: Path, secateur_command: Callable[..., Any]) -> None:
    orphan = write_orphan(tmp_path, "24-fp8")
    seen = secateur_command("inspect", orphan)
    assert "it holds sparse-24-bitmask, float-quantized (compressed-tensors 0.13.0)" in seen.stdout
    command = f"secateur compile {orphan} -o {orphan}-packed --format packed"
    assert f"to run it: {command}" in seen.stdout
    facts = json.loads(secateur_command("inspect", orphan, "--json").stdout)
    assert (facts["kind"], facts["rescue"]) == ("orphan", command)
    patterns = {
        name.rpartition(".")[2]: layer["pattern"] for name, layer in facts["layers"].items()
    }
    dense = {"k_proj": "dense", "v_proj": "dense"}
    assert patterns == dict.fromkeys(LINEARS, "2:4") | dense

    rescued = secateur_command(*command.split()[1:])
    assert rescued.returncode == 0, rescued.stderr
    assert "note: read from sparse-24-bitmask, float-quantized" in rescued.stdout
    assert "fp8 values kept as they were, a scale for each row" in rescued.stdout
    manifest = Manifest.read(f"{orphan}-packed")
    assert manifest.source["kind"] == "orphan"
    assert manifest.notes[0].startswith("read from sparse-24-bitmask")

    again = secateur_command(
        *("compile", f"{orphan}-packed", "-o", tmp_path / "again"),
        *("--format", "compressed-tensors", "--values", "fp16", "--json"),
    )
    assert json.loads(again.stdout)["values"] == "fp16"
    one, other = OrphanCheckpoint(tmp_path / "again"), read_packed(f"{orphan}-packed")
    for tensor in one.names():
        assert torch.equal(one.load(tensor), other.load(tensor).half())


def test_integers_that_are_kept(tmp_path: Path, secateur_command: Callable[..., Any]) -> None:
    orphan = write_orphan(tmp_path, "marlin-int4")
    ran = secateur_command("compile", orphan, "-o", tmp_path / "packed")
    assert "integers kept as they were, groups of 128" in ran.stdout
    back = secateur_command(
        "compile", tmp_path / "packed", "-o", tmp_path / "back", "--format", "marlin-24"
    )
    assert back.returncode == 0, back.stderr
    one, other = single(orphan), single(tmp_path / "back")
    assert one.keys() == other.keys()
    for tensor in other:
        assert torch.equal(one[tensor], other[tensor]), tensor


def single(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of all shards."""
    files = sorted(directory.glob("model-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_what_config_json_says(tmp_path: Path) -> None:
    pruned = prune_by_hand(tmp_path / "p", hidden=32, inner=48, dense=("up_proj",))
    write_compressed_tensors(pruned, tmp_path / "fp8", values="fp8")
    found = Checkpoint(tmp_path / "fp8").config["quantization_config"]
    left = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]
    assert found["sparsity_config"] == {
        "format": "sparse-24-bitmask",
        "targets": ["Linear"],
        "ignore": [*left, "lm_head"],
        "global_sparsity": pytest.approx(0.5 * (1 - 2 * 48 * 32 / total(pruned))),
        "sparsity_structure": "2:4",
    }
    assert (found["format"], found["ignore"]) == ("float-quantized", ["lm_head"])
    group = found["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == ("channel", False)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == (
        "token",
        True,
    )
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert stored[f"{left[0]}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{left[0]}.weight_scale"].shape == (48, 1)
    write_compressed_tensors(pruned, tmp_path / "plain")
    assert Checkpoint(tmp_path / "plain").config["quantization_config"].keys() == {
        "quant_method",
        "version",
        "sparsity_config",
    }


def total(directory: Path) -> int:
    return sum(
        layer.shape[0] * layer.shape[1] for layer in Manifest.read(directory).layers.values()
    )


def test_a_mixture_of_patterns_is_unstructured(tmp_path: Path) -> None:
    """One sparsity_config speaks for all linears."""
    pruned = prune_by_hand(tmp_path / "p", "2:4", hidden=32, inner=48)
    weights = load_file(pruned / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0:4] = 1.0
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    (pruned / "manifest.json").unlink()
    report = write_compressed_tensors(pruned, tmp_path / "out")
    patterns = {layer.pattern for layer in report.layers.values()}
    assert len(patterns) == 2
    found = OrphanCheckpoint(tmp_path / "out")
    assert found.form.startswith("sparse-bitmask")
    for tensor in found.names():
        assert torch.equal(found.load(tensor), weights[tensor])


def test_marlin_leaves_what_does_not_fit(tmp_path: Path) -> None:
    pruned = prune_by_hand(tmp_path / "p", hidden=128, inner=192, dense=("q_proj",))
    report = write_marlin24(pruned, tmp_path / "out", values="int8", quantize="rtn")
    left = {name.rpartition(".")[2]: why for name, why in report.kept_dense.items()}
    # two heads of 64: k and v fit, 192 rows or columns do not
    assert left.keys() == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert "multiples of 128" in left["up_proj"]
    before, after = (
        load_file(pruned / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    for name in report.kept_dense:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    config = Checkpoint(tmp_path / "out").config["quantization_config"]
    assert config["ignore"] == sorted([*report.kept_dense, "lm_head"])
    assert "sparsity_config" not in config
    assert not (tmp_path / "out.integers").exists()


def test_gptq_is_marlins_default(tmp_path: Path, secateur_command: Callable[..., Any]) -> None:
    pruned = prune_by_hand(tmp_path / "p", hidden=128, inner=128)
    walk = ("--samples", 2, "--length", 16, "-q")
    ran = secateur_command(
        "compile", pruned, "-o", tmp_path / "m", "--format", "marlin-24", "--values", "int4", *walk
    )
    assert ran.returncode == 0, ran.stderr
    assert "quantised by gptq" in ran.stdout
    pack_model(
        pruned,
        tmp_path / "packed",
        values="int4",
        group_size=128,
        calibration=Calibration(data="self", samples=2, length=16),
        quiet=True,
    )
    one, other = OrphanCheckpoint(tmp_path / "m"), read_packed(tmp_path / "packed")
    for name in other.layers:
        assert torch.equal(one.load(f"{name}.weight"), other.load(f"{name}.weight"))


@pytest.mark.parametrize("values", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_rounding(values: Any, dtype: torch.dtype, scales: Any) -> None:
    made = torch.Generator().manual_seed(0)
    weight = (torch.randn(9, 40, generator=made) * 0.03).to(dtype)
    weight[4] = 0
    found, scale = round_rows("P.weight", weight, values, scales, dtype)
    limit = 127 if values == "int8" else 448
    assert scale.shape == ((9, 1) if scales == "channel" else (1,))
    wide = weight.double()
    largest = wide.abs().amax(dim=1, keepdim=True) if scales == "channel" else wide.abs().max()
    enough = scale.double() * limit >= largest
    assert enough.all()
    # the next smaller scale of that type would clip
    assert (torch.nextafter(scale, scale * 0).double() * limit < largest)[largest > 0].all()
    error = (found.double() * scale.double() - wide).abs()
    step = scale.double() if values == "int8" else scale.double() * 2.0**-8 + wide.abs() / 8
    assert (error <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--format", "packed", "--era", "0.8"], "--era is of no use to --format packed"),
        (["--format", "dense", "--scales", "channel"], "--scales is of no use to --format dense"),
        (["--format", "compressed-tensors", "--quantize", "rtn"], "--quantize is of no use"),
        (["--format", "compressed-tensors", "--group-size", "64"], "--group-size is of no use"),
        (["--format", "compressed-tensors", "--values", "int4"], "has no values 'int4'"),
        (["--format", "compressed-tensors", "--era", "0.7"], "use 0.9 or 0.8"),
        (
            ["--format", "compressed-tensors", "--scales", "group", "--values", "fp8"],
            "use channel or tensor",
        ),
        (
            ["--format", "compressed-tensors", "--era", "0.8", "--values", "fp8"],
            "read no quantised weights",
        ),
        (["--format", "marlin-24"], "add --values int4 or int8"),
        (["--format", "marlin-24", "--values", "fp8"], "has integers, not fp8"),
        (["--format", "marlin-24", "--values", "int8", "--scales", "channel"], "--quantize rtn"),
        (
            ["--format", "marlin-24", "--values", "int8", "--scales", "tensor"],
            "use group or channel",
        ),
        (
            ["--format", "packed", "--values", "fp8", "--group-size", "64"],
            "--group-size is of use to --values int8 and int4 only",
        ),
    ],
)
def test_flags_that_do_not_go_together(
    pruned: Path,
    tmp_path: Path,
    secateur_command: Callable[..., Any],
    extra: list[str],
    said: str,
) -> None:
    ran = secateur_command("compile", pruned, "-o", tmp_path / "out", *extra)
    assert ran.returncode == 2, ran.stderr
    assert said in ran.stderr
    assert not (tmp_path / "out").exists()
