"""Pruning methods side by side: one calibration, one evaluation, a row per pattern and method.

Every cell of the table is a `secateur prune` in a process of its own, so that its seconds and its
peak memory are its own; what it made is read by `measure_accuracy` and deleted. A finished cell
leaves a JSON file with the identity of its measurement, by which a repeated run finds it.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secateur import recipe
from secateur.artifact import Manifest
from secateur.bench.accuracy import measure_accuracy
from secateur.bench.method_results import Compat, Entry, MethodRow, MethodsResult
from secateur.bench.processes import run_process, run_secateur
from secateur.bench.results import AccuracyResult, ModelAccuracy
from secateur.bench.work import Work
from secateur.errors import SecateurError, UsageError
from secateur.pattern import Pattern
from secateur.source import resolve_model

Item = TypeVar("Item")
EVALUATION = recipe.Accuracy(windows=16)


def measure_methods(
    model: str,
    patterns: Sequence[str],
    methods: Sequence[str],
    calibration: recipe.Calibration | None = None,
    evaluation: recipe.Accuracy = EVALUATION,
    *,
    compat: Compat = "exact",
    device: str = "auto",
    work: str | Path = "methods.work",
    keep: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> MethodsResult:
    """Prune a model by every method to every pattern, and measure what is left of it.

    A cell that fails is a row with its reason. Repeated, the call measures only what ``work``
    does not hold under the same model, texts, settings, versions and processor.

    Args:
        model: model directory, .gguf file or hub name.
        patterns: e.g. ``["2:4", "50%"]``.
        methods: entries as `Entry` reads them.
        calibration, evaluation: the texts, as in a recipe.
        compat, device: as in ``secateur prune``.
        work: directory for the pruned models and for what is finished.
        keep: leave the pruned models there.
        command: kept in the result.
        say: called with a line for everything that is begun, finished or skipped.

    Raises:
        UsageError: a pattern or method is unknown or named twice.
        ModelError: the model or a text is missing or unsupported.
    """
    calibration = calibration or recipe.Calibration()
    wanted = [(pattern, entry) for pattern in _patterns(patterns) for entry in _entries(methods)]
    place = Work(
        Path(work), resolve_model(model), calibration, evaluation, device, {"compat": compat}, say
    )
    bench = _Bench(place, compat, keep, say)
    rows = {cell: row for cell in wanted if (row := bench.finished(*cell))}
    place.make()
    for pattern, entry in rows:
        say(f"{pattern} {entry.text}: measured before, taken from {place.path}")
    earlier, todo = len(rows), [cell for cell in wanted if cell not in rows]
    bench.check(todo)
    dense = bench.dense()
    for number, (pattern, entry) in enumerate(todo):
        if number in (0, len(todo) // 2):
            bench.time_passes()  # spread over the run: the machine has better and worse minutes
        say(f"[{number + 1}/{len(todo)}] {pattern} {entry.text}")
        rows[pattern, entry] = row = bench.measure(pattern, entry)
        say(f"  {_headline(row)}")
    if todo or not bench.passes():
        bench.time_passes()
    passes = bench.passes()
    order = [str(pattern) for pattern, _ in wanted]
    return MethodsResult(
        environment=place.environment,
        dtype=dense.dtype,
        notes=tuple(_notes(calibration, evaluation, rows.values(), earlier)),
        command=command,
        model=model,
        model_sha256=place.identity["model"],
        calibration=calibration,
        compat=compat,
        text=dense.text,
        window=dense.window,
        stride=dense.stride,
        windows=dense.windows,
        predicted_tokens=dense.predicted_tokens,
        dense=dense.models[0],
        dense_passes_seconds=passes,
        rows=tuple(
            _compared(row, statistics.median(passes))
            for row in sorted(rows.values(), key=lambda r: (order.index(r.pattern), r.perplexity))
        ),
    )


def _patterns(patterns: Sequence[str]) -> list[Pattern]:
    return _distinct([Pattern.parse(pattern) for pattern in patterns], patterns, "pattern")


def _entries(methods: Sequence[str]) -> list[Entry]:
    return _distinct([Entry.parse(method) for method in methods], methods, "method")


def _distinct(items: list[Item], texts: Sequence[str], kind: str) -> list[Item]:
    if not items:
        raise UsageError(f"there is no {kind} to measure", f"name at least one {kind}")
    for number, item in enumerate(items):
        if item in items[:number]:
            raise UsageError(f"the {kind} {texts[number]!r} is named twice", "name it once")
    return items


def _notes(
    calibration: recipe.Calibration,
    evaluation: recipe.Accuracy,
    rows: Collection[MethodRow],
    earlier: int,
) -> list[str]:
    notes = []
    if calibration.data == evaluation.data:
        notes.append(
            f"calibrated and evaluated on the same text {calibration.data!r}: this flatters "
            "every method that calibrates"
        )
    if earlier:
        notes.append(f"{earlier} of {len(rows)} cells were measured by an earlier run")
    return [*notes, *dict.fromkeys(f"{row.pattern}: {note}" for row in rows for note in row.notes)]


def _compared(row: MethodRow, passes: float) -> MethodRow:
    relative = None if row.seconds is None else row.seconds / passes
    return row.model_copy(update={"relative_seconds": relative})


def _headline(row: MethodRow) -> str:
    if row.accuracy is None:
        return f"failed: {row.error}"
    return f"perplexity {row.perplexity:.4g}, {row.seconds:.1f} s"


@dataclass(frozen=True)
class _Bench:
    """The cells, and the directory that holds what is finished."""

    work: Work
    compat: Compat
    keep: bool
    say: Callable[[str], None]

    def folder(self, pattern: Pattern, entry: Entry) -> Path:
        """Where a cell is pruned to; its facts are beside it, with ``.json`` at the end."""
        return self.work.path / re.sub(r"[^\w.+=-]+", "-", f"{pattern} {entry.text}").strip("-")

    def finished(self, pattern: Pattern, entry: Entry) -> MethodRow | None:
        """The row of a cell that an earlier run measured in the same way."""
        folder = self.folder(pattern, entry)
        row = self.work.read(folder.name, MethodRow, pattern=str(pattern), method=entry.text)
        return None if self.keep and not folder.is_dir() else row

    def check(self, cells: Collection[tuple[Pattern, Entry]]) -> None:
        """Let prune plan each method once, which reads no weight, before hours are spent."""
        for pattern, entry in {entry: (pattern, entry) for pattern, entry in cells}.values():
            run_secateur([*self._prune(pattern, entry), "--dry-run"])

    def dense(self) -> AccuracyResult:
        """How the dense model reads the evaluation text."""
        found = self.work.read("dense", AccuracyResult)
        if found is not None:
            return found
        self.say(f"dense: {self.work.model}")
        result = measure_accuracy([self.work.model], self.work.evaluation, device=self.work.device)
        self.work.write("dense", result.to_json())
        return result

    def passes(self) -> tuple[float, ...]:
        """The timings of two dense passes so far."""
        return self.work.read("passes", tuple[float, ...]) or ()

    def time_passes(self) -> None:
        """Time two dense passes once more."""
        self.say("two dense passes, to compare times with")
        text = self.work.calibration
        arguments = [
            str(self.work.model),
            self.work.text,
            text.samples,
            text.length,
            text.seed,
            self.work.device,
        ]
        script = (
            "import json, sys; from secateur.bench.calibrated_work import time_dense_passes; "
            "print(time_dense_passes(*json.loads(sys.argv[1])))"
        )
        printed, _ = run_process([sys.executable, "-c", script, json.dumps(arguments)])
        self.work.write("passes", [*self.passes(), float(printed)])
        self.say(f"  {float(printed):.1f} s")

    def measure(self, pattern: Pattern, entry: Entry) -> MethodRow:
        """Prune and measure one cell; a failure is a row too, but is not kept."""
        folder = self.folder(pattern, entry)
        partial = folder.with_name(f"{folder.name}.partial")
        # Half a pruning would be taken up where it ended, and half of its seconds be lost.
        shutil.rmtree(partial, ignore_errors=True)
        name = {"pattern": str(pattern), "method": entry.text}
        try:
            answer, peak = run_secateur([*self._prune(pattern, entry), "--overwrite"])
            row = MethodRow(
                **name,
                accuracy=self._accuracy(folder),
                seconds=answer["seconds"]["prune"],
                peak_rss_bytes=peak,
                **_layer_facts(Manifest.model_validate(answer["manifest"])),
            )
        except SecateurError as fault:
            return MethodRow(**name, error=fault.what)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.work.write(folder.name, row.model_dump(mode="json"), **name)
        return row

    def _accuracy(self, folder: Path) -> ModelAccuracy:
        try:
            result = measure_accuracy(
                [folder], self.work.evaluation, against=self.work.model, device=self.work.device
            )
        finally:
            if not self.keep:
                shutil.rmtree(folder)
        return result.models[0]

    def _prune(self, pattern: Pattern, entry: Entry) -> list[str]:
        output, method = self.folder(pattern, entry), entry.arguments()
        how = ["--pattern", str(pattern), "--compat", self.compat, *self.work.calibrated()]
        return ["prune", str(self.work.model), "-o", str(output), *method, *how]


def _layer_facts(manifest: Manifest) -> dict[str, Any]:
    layers = manifest.layers
    weights = {name: fact.shape[0] * fact.shape[1] for name, fact in layers.items()}
    zeros = sum(fact.sparsity * weights[name] for name, fact in layers.items())
    errors = {
        name: fact.relative_error
        for name, fact in layers.items()
        if fact.relative_error is not None
    }
    worst = max(errors, key=errors.__getitem__, default=None)
    return {
        "sparsity": zeros / sum(weights.values()),
        "error_mean": statistics.fmean(errors.values()) if errors else None,
        "error_worst": errors[worst] if worst else None,
        "worst_layer": worst,
        "notes": tuple(manifest.notes),
    }
