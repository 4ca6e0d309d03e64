"""The commands end to end, in this process."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

import secateur.cli.bench_command
from secateur.bench import AccuracyResult, LatencyResult
from secateur.cli import app
from secateur.errors import UsageError
from secateur.recipe import Accuracy, Latency

QUICK = ["--prompt", "8", "--new-tokens", "2", "--rounds", "2", "--min-seconds", "0"]


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_accuracy_as_a_table(dense: Path, sparse: Path, text: Path) -> None:
    shown = run("accuracy", sparse, "--against", dense, "--data", text, "--window", "32")
    result = AccuracyResult.model_validate_json(
        run("accuracy", sparse, "--against", dense, "--data", text, "--window", "32", "--json")
    )
    model = result.models[0]
    assert model.kl is not None
    assert f"{model.perplexity.value:.4f} ± {model.perplexity.standard_error:.4f}" in shown
    assert f"{model.kl.value:.4f}" in shown
    assert "6 windows of 32 tokens, stride 32, 186 predicted tokens (of 201 in the text)" in shown
    assert result.text.sha256 in shown
    assert result.environment.cpu in shown


def test_one_window_has_no_error_to_show(dense: Path, text: Path) -> None:
    shown = run("accuracy", dense, "--data", text, "--window", "32", "--windows", "1")
    row = next(line for line in shown.splitlines() if str(dense) in line)
    assert "±" not in row


def test_latency_as_a_table(dense: Path, sparse: Path, tmp_path: Path) -> None:
    shown = run("latency", sparse, "--against", dense, *QUICK, "--output", tmp_path / "out.json")
    result = LatencyResult.model_validate_json((tmp_path / "out.json").read_text())
    speedup = result.models[0].points[0].decode_speedup
    assert speedup is not None
    assert f"{speedup.value:.3f} ± {speedup.stddev:.3f}" in shown
    assert "baseline" in shown
    assert "2 interleaved rounds" in shown


def test_layers_are_added_up_by_name(dense: Path, sparse: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    loads = ["--batch", "1,2", "--layers", "--output", out]
    shown = run("latency", sparse, "--against", dense, *QUICK, *loads)
    result = LatencyResult.model_validate_json(out.read_text())
    assert result.baseline is not None
    for batch in (1, 2):
        times = []
        for model in (result.baseline, result.models[0]):
            both = [one for one in model.layers if one.tokens == batch and "q_proj" in one.name]
            times.append(sum(statistics.median(one.us.samples) for one in both))
            assert len(both) == 2
        rows = [line.split()[-5:] for line in shown.splitlines() if "2 q_proj" in line]
        (own,) = [row for row in rows if row[0] == str(batch) and row[-1] != "baseline"]
        assert own[2] == f"{times[1]:.0f}"
        assert own[-1] == f"{times[0] / times[1]:.2f}"


def test_latency_as_json(dense: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(run("latency", dense, *QUICK, "--json", "--quiet"))
    assert printed["schema"] == "secateur/bench-latency/3"
    assert printed["baseline"] is None
    assert len(printed["models"][0]["points"][0]["prefill_tokens_per_s"]["samples"]) == 2
    assert capfd.readouterr().err == ""


def test_wrong_values_and_outputs_are_refused_first(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="window = 1"):
        run("accuracy", dense, "--window", "1")
    with pytest.raises(UsageError, match="there is no directory"):
        run("latency", dense, "--output", tmp_path / "absent" / "out.json")


@pytest.mark.parametrize(("command", "section"), [("accuracy", Accuracy), ("latency", Latency)])
def test_defaults_are_those_of_a_recipe(command: str, section: type[Accuracy | Latency]) -> None:
    import inspect

    flags = inspect.signature(getattr(secateur.cli.bench_command, command)).parameters
    given = {name: flags[name].default for name in section.model_fields}
    assert section.model_validate(given) == section()
