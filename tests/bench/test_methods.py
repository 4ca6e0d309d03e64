"""`bench methods`: real processes on a tiny model, and what is made of their results."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import secateur.cli.methods_bench_command as command
from secateur.artifact import Manifest
from secateur.bench import measure_accuracy, methods
from secateur.bench.calibrated_work import time_dense_passes
from secateur.bench.method_results import Entry, MethodsResult, split_entries
from secateur.bench.methods import measure_methods
from secateur.bench.processes import run_process
from secateur.bench.work import Work
from secateur.errors import ModelError, SecateurError, UsageError
from secateur.prune import prune_model
from secateur.recipe import Accuracy, Calibration, Prune
from secateur.walk import Walk

Command = Callable[..., Any]
pytestmark = pytest.mark.timeout(900)  # eleven processes, each of which imports transformers


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods") / "work"


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(data=str(text_file), samples=4, length=32)


@pytest.fixture(scope="module")
def reading(text: Path) -> Accuracy:
    return Accuracy(data=str(text), window=32, windows=4)


@pytest.fixture(scope="module")
def table(dense: Path, calibration: Calibration, reading: Accuracy, work: Path) -> MethodsResult:
    """Two patterns by two methods, in seven processes: dense passes are timed once, not thrice."""
    time_passes = methods._Bench.time_passes

    def once(bench: methods._Bench) -> None:
        if known := bench.passes():
            bench.work.write("passes", [*known, 2 * known[-1]])
        else:
            time_passes(bench)

    chains = ["magnitude", "wanda+lsq[lsq.damping=0.001]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods._Bench, "time_passes", once)
        return measure_methods(
            str(dense), ["50%", "2:4"], chains, calibration, reading, work=work, command="x | y"
        )


@pytest.fixture
def cells_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process but those that prune; dense passes take two seconds."""

    def time_passes(bench: methods._Bench) -> None:
        bench.work.write("passes", [*bench.passes(), 2.0])

    monkeypatch.setattr(methods._Bench, "check", lambda *_: None)
    monkeypatch.setattr(methods._Bench, "time_passes", time_passes)


def test_entries_are_split_outside_brackets_only() -> None:
    text = "wanda, alps:owl,sparsegpt[sparsegpt.percdamp=0.05,lsq.damp=1],wanda+swaps+lsq"
    assert [Entry.parse(entry).arguments() for entry in split_entries(text)] == [
        ["--method", "wanda"],
        ["--method", "alps", "--allocate", "owl"],
        ["--method", "sparsegpt", "--set", "sparsegpt.percdamp=0.05", "--set", "lsq.damp=1"],
        ["--method", "wanda+swaps+lsq"],
    ]
    both = Entry.parse("alps:owl[alps.rho=3]")
    assert both.arguments() == ["--method", "alps", "--allocate", "owl", "--set", "alps.rho=3"]


@pytest.mark.parametrize("text", ["", "wanda[", "wanda[]", "wanda[lsq]", "wanda:", "a[b=1]:owl"])
def test_an_entry_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        Entry.parse(text)


def test_rows_are_what_the_directories_measure(
    table: MethodsResult, dense: Path, calibration: Calibration, reading: Accuracy, tmp_path: Path
) -> None:
    assert [row.pattern for row in table.rows] == ["50%", "50%", "2:4", "2:4"]
    assert len({row.method for row in table.rows}) == 2
    for row in table.rows:
        chain, out = row.method.partition("[")[0], tmp_path / f"{row.pattern} {row.method[:5]}"
        settings = {"lsq.damping": 0.001} if "lsq" in chain else {}
        wanted = Prune.model_validate(
            {"method": chain, "pattern": row.pattern, "settings": settings}
        )
        manifest = prune_model(str(dense), out, wanted, calibration, quiet=True).manifest
        expected = measure_accuracy([out], reading, against=dense)
        own = expected.models[0]
        assert row.accuracy is not None
        assert row.accuracy.perplexity.value == pytest.approx(own.perplexity.value, rel=1e-6)
        assert row.accuracy.window_nll == pytest.approx(own.window_nll, rel=1e-6)
        for name in ("perplexity_ratio", "kl", "top1_agreement"):
            got, known = getattr(row.accuracy, name), getattr(own, name)
            assert got.value == pytest.approx(known.value, rel=1e-5), name
            assert got.standard_error == pytest.approx(known.standard_error, rel=1e-5), name
        errors = {name: fact.relative_error for name, fact in manifest.layers.items()}
        assert row.error_mean == pytest.approx(sum(errors.values()) / len(errors), rel=1e-5)  # type: ignore[arg-type]
        assert row.worst_layer is not None
        assert row.error_worst == errors[row.worst_layer] == max(errors.values())  # type: ignore[type-var]
        assert row.sparsity == pytest.approx(0.5)
        assert table.text == expected.text.model_copy(update={"tokenizer": str(dense)})
        assert expected.baseline is not None
        assert table.dense.perplexity == expected.baseline.perplexity


def test_rows_are_ranked_and_cost_what_they_cost(table: MethodsResult, work: Path) -> None:
    for pattern in ("50%", "2:4"):
        own = [row.perplexity for row in table.rows if row.pattern == pattern]
        assert own == sorted(own)
    assert len(table.dense_passes_seconds) == 3
    passes = sorted(table.dense_passes_seconds)[1]
    assert passes > 0
    for row in table.rows:
        assert row.seconds is not None
        assert row.relative_seconds == pytest.approx(row.seconds / passes)
        assert row.peak_rss_bytes is not None
        assert 100 * 2**20 < row.peak_rss_bytes < 4 * 2**30
    assert table.failed == ()
    assert [path for path in work.iterdir() if path.is_dir()] == []  # pruned models are deleted
    assert MethodsResult.model_validate(json.loads(json.dumps(table.to_json()))) == table


def test_a_finished_cell_is_taken_from_the_work_directory(
    table: MethodsResult,
    dense: Path,
    calibration: Calibration,
    reading: Accuracy,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "run_process", lambda _: pytest.fail("a process was started"))
    said: list[str] = []
    patterns, chains = ["2:4"], ["wanda+lsq[lsq.damping=0.001]"]
    again = measure_methods(
        str(dense), patterns, chains, calibration, reading, work=work, say=said.append
    )
    assert again.rows[0] in table.rows
    assert said == [f"2:4 {chains[0]}: measured before, taken from {work}"]
    assert "1 of 1 cells were measured by an earlier run" in again.notes
    assert again.dense_passes_seconds == table.dense_passes_seconds


@pytest.mark.usefixtures("cells_only")
def test_another_calibration_is_measured_again_and_may_be_kept(
    table: MethodsResult, dense: Path, calibration: Calibration, reading: Accuracy, work: Path
) -> None:
    changed = calibration.model_copy(update={"seed": 1})
    arguments = (str(dense), ["2:4"], ["wanda+lsq[lsq.damping=0.001]"], changed, reading)
    said: list[str] = []
    result = measure_methods(*arguments, work=work, keep=True, say=said.append)
    assert any(line.startswith("[1/1] 2:4 wanda+lsq") for line in said)
    assert result.rows[0].error_mean != table.rows[-1].error_mean
    assert result.dense_passes_seconds == (2.0, 2.0)
    kept = work / "2-4-wanda+lsq-lsq.damping=0.001"
    assert Manifest.read(kept).recipe["calibration"]["seed"] == 1
    written = (work / f"{kept.name}.json").stat().st_mtime_ns
    said.clear()
    measure_methods(*arguments, work=work, keep=True, say=said.append)
    assert [line.rpartition(": ")[2] for line in said] == [f"measured before, taken from {work}"]
    assert (work / f"{kept.name}.json").stat().st_mtime_ns == written
    place = Work(work, dense, changed, reading, "auto", {"compat": "exact"}, said.append)
    bench = methods._Bench(place, "exact", keep=True, say=said.append)
    kept.rename(work / "elsewhere")
    entry = Entry.parse(arguments[2][0])
    assert bench.finished(methods.Pattern.parse("2:4"), entry) is None  # asked for, and gone
    (work / f"{kept.name}.json").write_text("{")
    assert bench.finished(methods.Pattern.parse("2:4"), entry) is None


@pytest.mark.usefixtures("cells_only")
def test_a_failed_cell_is_a_row_and_an_exit_code(
    dense: Path, text: Path, tmp_path: Path, secateur_command: Command
) -> None:
    arguments = ["bench", "methods", dense, "--patterns", "2:4", "--methods", "wanda,magnitude"]
    arguments += ["--data", "none", "--eval", text, "--window", 32, "--windows", 2]
    arguments += ["--output", tmp_path / "out.json", "--markdown", tmp_path / "out.md"]
    ran = secateur_command(*arguments, "--json")
    assert ran.returncode == 3
    assert ran.stderr.endswith("error: 1 of 2 cells failed; the table says why\n")
    assert "[2/2] 2:4 magnitude" in ran.stderr
    result = MethodsResult.model_validate_json(ran.stdout)
    assert result == MethodsResult.read(tmp_path / "out.json")
    good, bad = result.rows
    assert (good.method, good.error, good.error_mean) == ("magnitude", None, None)
    assert (bad.method, bad.accuracy) == ("wanda", None)
    assert bad.error is not None
    assert "needs calibration text" in bad.error
    page = (tmp_path / "out.md").read_text()
    assert "| wanda | failed |" in page
    assert f"failed: 2:4 wanda: {bad.error}" in page
    assert f"- command: secateur bench methods {dense} --patterns 2:4" in page
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == [
        "2-4-magnitude.json",
        "dense.json",
        "passes.json",
    ]


def test_what_is_wrong_is_said_before_anything_is_measured(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "measure_accuracy", lambda *_, **__: pytest.fail("measured"))

    def measure(patterns: list[str], chains: list[str], data: Path | str = text) -> None:
        calibration = Calibration(data=str(data), samples=2, length=16)
        measure_methods(
            str(dense),
            patterns,
            chains,
            calibration,
            Accuracy(data=str(text)),
            work=tmp_path / "work",
        )

    with pytest.raises(UsageError, match="there is no pruning method 'wnada'") as fault:
        measure(["2:4"], ["wnada"])
    assert "did you mean 'wanda'" in fault.value.fix
    with pytest.raises(UsageError, match="'2-4' is not understood"):
        measure(["2-4"], ["wanda"])
    with pytest.raises(UsageError, match=r"the pattern '50\.0%' is named twice"):
        measure(["50%", "50.0%"], ["wanda"])
    with pytest.raises(UsageError, match="no method to measure"):
        measure(["50%"], [])
    with pytest.raises(ModelError, match=r"absent\.txt cannot be read"):
        measure(["2:4"], ["wanda"], "absent.txt")
    assert list((tmp_path / "work").iterdir()) == []
    (tmp_path / "work" / "file").touch()
    with pytest.raises(UsageError, match=r"work directory .* cannot be made"):
        measure_methods(str(dense), ["2:4"], ["wanda"], work=tmp_path / "work" / "file")


def test_flags_that_contradict_each_other(
    dense: Path, tmp_path: Path, secateur_command: Command
) -> None:
    other = tmp_path / "other.json"
    start, page = ["bench", "methods", dense], ["--markdown", tmp_path / "x.md"]
    assert "--markdown" in secateur_command(*start, "--merge", other).stderr
    assert "cannot be read" in secateur_command(*start, "--merge", other, *page).stderr
    other.write_text('{"schema": "secateur/bench-accuracy/1"}')
    ran = secateur_command(*start, "--merge", other, *page)
    assert ran.returncode == 2
    assert "is no result of bench methods" in ran.stderr


def test_dense_passes_run_every_block_twice(
    dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    advance = Walk.advance
    monkeypatch.setattr(Walk, "advance", lambda walk, at: [ran.append(at), advance(walk, at)])
    for data in (str(text), "self"):
        assert 0 < time_dense_passes(str(dense), data, 2, 100, 0) < 30
    assert ran == [0, 0, 1, 1] * 2


def test_a_process_answers_for_its_own_memory_only() -> None:
    hundred = 100 * 2**20
    ballast = bytearray(os.urandom(4096)) * (3 * hundred // 4096)
    printed, peak = run_process([sys.executable, "-c", "print('a'); print('b')"])
    assert printed == "a\nb\n"
    assert 2**20 < peak < hundred
    _, peak = run_process([sys.executable, "-c", f"x = b'x' * {2 * hundred}"])
    assert 2 * hundred < peak < len(ballast)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("raise ValueError('no such thing')", "exit code 1: ValueError: no such thing"),
        ("raise SystemExit(7)", "exit code 7: it said nothing"),
    ],
)
def test_how_a_process_failed(script: str, says: str) -> None:
    with pytest.raises(SecateurError, match=says):
        run_process([sys.executable, "-c", script])


def test_an_interrupted_measurement_leaves_no_process_behind(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    started = tmp_path / "pid"
    script = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_process([sys.executable, "-c", script, str(started)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_the_end_of_a_terminal_session_is_an_interruption(
    dense: Path, secateur_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(methods, "measure_methods", terminated)
    before = signal.getsignal(signal.SIGTERM)
    ran = secateur_command("bench", "methods", dense)
    assert ran.returncode == 130
    assert "run the same command again to go on" in ran.stderr
    assert signal.getsignal(signal.SIGTERM) is before


def test_markdown_of_one_result(table: MethodsResult) -> None:
    lines = command.markdown([table]).splitlines()
    assert lines[0] == "# Pruning methods compared on dense"
    assert (
        f"- calibration: 4 x 32 tokens of {table.calibration.data}, seed 0; compat exact" in lines
    )
    assert "- command: x | y" in lines
    assert [line for line in lines if line.startswith("## ")] == ["## 50%", "## 2:4"]
    rows = [line for line in lines if line.startswith("| wanda+lsq[lsq.damping=0.001] |")]
    assert len(rows) == 2
    cells = [cell.strip() for cell in rows[1].split("|")[2:-1]]
    own = next(r for r in table.rows if r.pattern == "2:4" and r.method.startswith("wanda"))
    assert own.accuracy is not None
    assert own.accuracy.perplexity_ratio is not None
    assert len(cells) == len(command.TITLES)
    assert cells[0].startswith(f"{own.perplexity:.4g}"[:3])
    assert cells[1].startswith(f"{own.accuracy.perplexity_ratio.value:.3f}"[:4])
    assert cells[6] == "50.00 %"
    assert cells[8] == f"{own.relative_seconds:.1f}x"


def test_markdown_of_two_results(table: MethodsResult) -> None:
    c4 = Calibration(data="c4", samples=8, length=32)
    fewer = table.model_copy(update={"calibration": c4, "rows": table.rows[2:]})
    page = command.markdown([table, fewer])
    first, second, third = page.split("\n## Calibrated on ")
    assert "| method | text.txt, 4 x 32, seed 0 | c4, 8 x 32, seed 0 |" in first
    best = table.rows[0]
    assert best.accuracy is not None
    assert best.accuracy.perplexity_ratio is not None
    half, of_four = first.split("\n## ")[1:]
    assert f"({best.accuracy.perplexity_ratio.value:.3f}x) |  |" in half.splitlines()[4]
    assert all(line.count("x) ") == 2 for line in of_four.splitlines()[4:6])
    assert second.count("\n### ") == 2
    assert third.startswith("c4, 8 x 32, seed 0\n")
    assert third.count("\n### ") == 1
    other = table.model_copy(update={"window": 16})
    with pytest.raises(UsageError, match="different models, evaluation texts or windows"):
        command.markdown([table, other])


def test_the_table_on_the_terminal(
    table: MethodsResult, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = table.rows[1].model_copy(update={"accuracy": None, "error": "a | b\nc"})
    result = table.model_copy(update={"rows": (table.rows[0], failed)})
    command.show_methods(result)
    shown = capsys.readouterr().out
    assert " 50%      " in shown
    assert "[lsq.damping=0.001]" in shown
    assert "failed: 50% " in shown
    assert "sha256 of the evaluated ids " + table.text.sha256 in shown
    assert "\\|" not in command.markdown([result]).partition("## 50%")[0]


def test_numbers_show_four_digits_and_their_error_to_as_many_places() -> None:
    shown = [(1186.9, 80.1), (17.3245, 0.61), (0.041234, 0.00111), (0.0, None), (123456.0, 7.0)]
    assert [command._number(*pair) for pair in shown] == [
        "1187 ± 80",
        "17.32 ± 0.61",
        "0.04123 ± 0.00111",
        "0.000",
        "123456 ± 7",
    ]


def test_defaults_are_those_of_a_recipe() -> None:
    import inspect

    flags = inspect.signature(command.methods).parameters
    for name, field in Calibration.model_fields.items():
        assert flags[name].default == field.default, name
    assert flags["evaluation"].default == methods.EVALUATION.data
    assert flags["window"].default == methods.EVALUATION.window
    assert flags["windows"].default == methods.EVALUATION.windows
    assert flags["compat"].default == Prune().compat
