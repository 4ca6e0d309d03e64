"""`secateur compile` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

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
