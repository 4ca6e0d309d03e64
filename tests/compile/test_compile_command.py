"""`secateur compile` as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secateur.artifact import Manifest
from secateur.cli import main
from secateur.compile import PackReport, read_packed


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["secateur", "compile", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_table(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, pruned, "-o", tmp_path / "packed", "--values", "bf16") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    assert next(line for line in lines if line[:1] == ["mlp.down_proj"])[1:4] == [
        "2",
        "36x44",
        "2:4",
    ]
    assert any(line[:3] == ["packed", "linears", "14"] for line in lines)
    assert "of weights as bf16" in out
    assert read_packed(tmp_path / "packed").config.values == "bf16"


def test_what_was_not_pruned_is_said_in_one_line_for_each_reason(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rtn = ("--values", "int8", "--quantize", "rtn", "--data", "none")
    assert run(monkeypatch, tiny, "-o", tmp_path / "packed", *rtn) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not pruned")]
    assert len(said) == 1
    assert said[0].startswith("not pruned: model.layers.0.")
    assert ".k_proj, " in said[0]
    assert " and 11 more: " in said[0]


def test_json_is_the_typed_result(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, pruned, "-o", tmp_path / "packed", "--json") == 0
    report = PackReport.model_validate(json.loads(capsys.readouterr().out))
    assert report.values == "fp32"
    assert len(report.layers) == 14


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (["--values", "fp61"], 2, "did you mean 'fp16'"),
        (["--group-size", "32"], 2, "--group-size is of use to --values int8 and int4 only"),
        (["--values", "bf16", "--data", "pydoc"], 2, "--data is of use to --values int8"),
        (["--format", "dense", "--values", "int8"], 2, "floating-point weights, not int8"),
        (["--values", "int8", "--data", "none"], 2, "use --quantize rtn"),
        (["--values", "int8", "--quantize", "rtn", "--seed", "1"], 2, "--seed is of no use to rtn"),
        (
            ["--values", "int8", "--quantize", "rtn", "--data", "none", "--seed", "1"],
            2,
            "--seed is",
        ),
        (["--values", "int8", "--quantize", "gtpq"], 2, "quantize = 'gtpq'"),
        (["--values", "int8", "--samples", "0"], 2, "calibration: samples = 0"),
        (["--format", "packd"], 2, "did you mean 'packed'"),
        (["--overwrite"], 0, ""),
        ([], 2, "already exists"),
    ],
)
def test_exit_codes(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    code: int,
    said: str,
) -> None:
    run(monkeypatch, pruned, "-o", tmp_path / "packed")
    assert run(monkeypatch, pruned, "-o", tmp_path / "packed", *extra) == code
    assert said in capsys.readouterr().err


def test_a_missing_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "none", "-o", tmp_path / "packed") == 3
    assert "there is no model directory" in capsys.readouterr().err


SHORT = ("--samples", 2, "--length", 16)


def test_quantising_tells_its_errors_and_its_text(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = (pruned, "-o", tmp_path / "packed", "-q", *SHORT)
    assert run(monkeypatch, *where, "--values", "int4", "--group-size", 32) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    row = next(line for line in lines if line[:1] == ["mlp.down_proj"])
    assert row[1:4] == ["2", "36x44", "2:4"]
    assert 0 < float(row[7]) < 0.1  # rounding
    assert row[9] == "%"
    assert "quantised by gptq, groups of 32, on 32 tokens of 'self', seed 0" in out
    assert "of weights as int4" in out
    packed = read_packed(tmp_path / "packed")
    assert (packed.config.values, packed.config.group_size) == ("int4", 32)

    monkeypatch.setattr(sys, "argv", ["secateur", "inspect", str(tmp_path / "packed"), "--json"])
    with pytest.raises(SystemExit):
        main()
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["values"], facts["group_size"]) == ("packed", "int4", 32)
    layer = facts["layers"]["model.layers.0.mlp.down_proj"]
    assert layer["quantize"]["method"] == "gptq"
    monkeypatch.setattr(sys, "argv", ["secateur", "inspect", str(tmp_path / "packed")])
    with pytest.raises(SystemExit):
        main()
    assert "values int4 in groups of 32" in " ".join(capsys.readouterr().out.split())


def test_rounding_to_nearest_reads_nothing(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rtn = ("--values", "int8", "--quantize", "rtn")
    assert run(monkeypatch, pruned, "-o", tmp_path / "packed", *rtn) == 0
    assert "reads no text, so no errors were measured" in capsys.readouterr().out
    assert run(monkeypatch, pruned, "-o", tmp_path / "b", *rtn, "--data", "self", *SHORT) == 0
    out, err = capsys.readouterr()
    assert "on 32 tokens of 'self'" in out
    assert "quantising blocks: 2/2" in err


def test_the_text_that_pruning_read_is_the_default(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_ids: Path
) -> None:
    path = pruned / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["calibration"] = {"data": str(make_ids)}
    path.write_text(json.dumps(manifest))
    run(monkeypatch, pruned, "-o", tmp_path / "packed", "--values", "int8", "-q")
    recipe = Manifest.read(tmp_path / "packed").recipe["compile"]
    assert recipe["calibration"]["data"] == str(make_ids)


@pytest.fixture
def make_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": torch.arange(60).reshape(3, 20)}, file)
    return file


def test_a_recipe_with_integers(
    tiny: Path, tmp_path: Path, secateur_command: Callable[..., Any]
) -> None:
    """All stages; the control is the model as it is, and a second run compiles nothing."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny}\noutput: {tmp_path / 'out'}\n"
        "calibration: {samples: 4, length: 32}\n"
        "compile: {values: int4, group_size: 32}\n"
        "bench:\n  accuracy: {window: 32, windows: 2}\n"
        "  latency: {prompt: 16, new_tokens: 4, rounds: 2, min_seconds: 0}\n"
    )
    first = secateur_command("run", recipe, "--json", "-q")
    assert first.returncode == 0, first.stderr
    packed = read_packed(tmp_path / "out" / "packed")
    assert (packed.config.values, packed.config.group_size) == ("int4", 32)
    assert not (tmp_path / "out" / "dense").exists()
    made = (tmp_path / "out" / "packed" / "timings.json").read_text()
    again = secateur_command("run", recipe, "--json", "-q")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "packed" / "timings.json").read_text() == made
    other = secateur_command("run", recipe, "--set", "compile.group_size=64")
    assert "compile.group_size was 32, now 64" in other.stderr
