"""`secateur layer` and the function behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from secateur.cli import (
    app,
    layer_command,  # noqa: F401
)
from secateur.errors import ModelError, UsageError
from secateur.prune.layer import prune_layer

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
SOURCE = GOLDENS / "a_inputs.safetensors"


def test_the_command_writes_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["layer", str(SOURCE), "--method", "wanda+dsnot", "--pattern", "60%"]
    arguments += ["--compat", "reference", "--set", "dsnot.cycles=10", "-o", str(out)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "wanda+dsnot, 60%, 64 x 96, compat reference" in shown.output
    assert "sparsity 0.593750" in shown.output
    assert "relative error 0.04326" in shown.output
    golden, found = load_file(GOLDENS / "a_dsnot_wanda_60_c10.safetensors"), load_file(out)
    assert torch.equal(found["mask_pruned"], golden["mask_pruned"])
    assert torch.equal(found["weight_out"], golden["weight_out"])
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    result = json.loads(printed.stdout)
    assert result["shape"] == [64, 96]
    assert result["sparsity"] == 0.59375
    assert result["facts"] == {"dsnot.rows_off_pattern": 0}
    assert result["output"] == str(out)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--compat", "refrence"], "did you mean 'reference'"),
        (["--set", "cycles:50"], "not of the form STEP.KEY=VALUE"),
        (["--set", "cycles=50"], "not of the form STEP.KEY=VALUE"),
        (["--set", "wanda.varant=1"], "did you mean 'variant'"),
        (["--method", "wand"], "did you mean 'wanda'"),
        (["--pattern", "5:4"], "keeps 5 of every 4"),
        (["--pattern", "2:5"], "96 inputs are not a multiple of 5"),
        (["-o", "nowhere/at/all.safetensors"], "no directory"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], what: str) -> None:
    fault = CliRunner().invoke(app, ["layer", str(SOURCE), *options]).exception
    assert isinstance(fault, UsageError)
    assert what in str(fault)


def test_a_layer_without_activations_is_pruned_but_not_measured(tmp_path: Path) -> None:
    source = tmp_path / "layer.safetensors"
    save_file({"weight": torch.randn(8, 16)}, source)
    result = prune_layer(source, None, "magnitude", "2:4")
    assert result.relative_error is None
    assert result.output is None
    assert result.sparsity == 0.5
    dense = prune_layer(SOURCE, None, "wanda", "dense")
    assert (dense.sparsity, dense.relative_error) == (0, 0)
    shown = CliRunner().invoke(app, ["layer", str(source), "--method", "magnitude"])
    assert "not measured: no activations" in shown.output


def fault_of(tmp_path: Path, method: str = "wanda", **tensors: Any) -> ModelError:
    source = tmp_path / "layer.safetensors"
    save_file(tensors, source)
    with pytest.raises(ModelError) as fault:
        prune_layer(source, None, method, "2:4")
    return fault.value


def test_files_that_do_not_hold_a_layer_are_refused(tmp_path: Path) -> None:
    weight, x = torch.randn(8, 16), torch.randn(2, 4, 16)
    assert "no tensor 'weight'" in fault_of(tmp_path, activations=x).what
    missing = fault_of(tmp_path, weight=weight)
    assert "no tensor 'activations'" in missing.what
    assert "[sequences, tokens, in]" in missing.fix
    gblm = fault_of(tmp_path, "gblm", weight=weight, activations=x)
    assert "no tensor 'grads_per_sample'" in gblm.what
    flat = fault_of(tmp_path, weight=weight, activations=x[0])
    assert "'activations' has the shape [4, 16]" in flat.what
    narrow = fault_of(tmp_path, weight=weight, activations=x[:, :, :12].contiguous())
    assert "does not fit the weight [8, 16]" in narrow.what
    nan = fault_of(tmp_path, weight=weight, activations=x * float("nan"))
    assert "NaN" in nan.what
    with pytest.raises(ModelError, match="no file"):
        prune_layer(tmp_path / "none", None, "wanda", "2:4")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        prune_layer(tmp_path / "text", None, "wanda", "2:4")


def test_half_precision_layers_are_computed_in_full(tmp_path: Path) -> None:
    tensors, source = load_file(SOURCE), tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, source)
    out = tmp_path / "out.safetensors"
    result = prune_layer(source, out, "gblm+swaps+lsq", "2:4", settings={"gblm.normalise": True})
    assert result.relative_error is not None
    assert result.relative_error < 0.02
    assert load_file(out)["weight_out"].dtype == torch.float32
