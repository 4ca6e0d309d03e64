"""Pruning methods side by side: one calibration, one evaluation, a row per pattern and method.

Every cell of the table is a `secateur prune` in a process of its own, so that its seconds and its
peak memory are its own; what it made is read by `measure_accuracy` and deleted. A finished cell
leaves a JSON file with the identity of its measurement, by which a repeated run finds it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from secateur import recipe
from secateur.artifact import Manifest
from secateur.bench.accuracy import measure_accuracy
from secateur.bench.method_results import Compat, Entry, MethodRow, MethodsResult
from secateur.bench.processes import run_process, run_secateur
from secateur.bench.results import (
    AccuracyResult,
    Environment,
    ModelAccuracy,
)
from secateur.calibration import read_text
from secateur.checkpoint import Checkpoint, file_sha256, write_json
from secateur.device import choose_device
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
    bench = _Bench(
        resolve_model(model), calibration, evaluation, compat, device, Path(work), keep, say
    )
    rows = {cell: row for cell in wanted if (row := bench.finished(*cell))}
    bench.make_work()
    for pattern, entry in rows:
        say(f"{pattern} {entry.text}: measured before, taken from {bench.work}")
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
        environment=bench.environment,
        dtype=dense.dtype,
        notes=tuple(_notes(calibration, evaluation, rows.values(), earlier)),
        command=command,
        model=model,
        model_sha256=bench.identity["model"],
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
    """What all cells have in common, and the directory that holds what is finished."""

    model: Path
    calibration: recipe.Calibration
    evaluation: recipe.Accuracy
    compat: Compat
    device: str
    work: Path
    keep: bool
    say: Callable[[str], None]

    @cached_property
    def environment(self) -> Environment:
        """This machine."""
        return Environment.read(choose_device(self.device))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers of every cell; what is missing is found out here."""
        calibration, evaluation = self.calibration, self.evaluation
        machine = self.environment
        return {
            "model": Checkpoint(self.model).sha256(),
            "calibration": calibration.model_dump() | {"sha256": _text_sha256(calibration.data)},
            "evaluation": evaluation.model_dump() | {"sha256": _text_sha256(evaluation.data)},
            "compat": self.compat,
            "machine": [machine.cpu, machine.cores, machine.device],
            "versions": machine.versions,
        }

    @cached_property
    def text(self) -> str:
        """What cells are told to calibrate on; what the model writes itself is written once."""
        calibration = self.calibration
        if calibration.data != "self":
            return calibration.data
        key = json.dumps([self.identity["model"], calibration.model_dump()], sort_keys=True)
        file = self.work / f"self-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if not file.exists():
            self.say("calibration text, written by the model")
            script = (
                "import sys; from secateur.bench.calibrated_work import write_own_text; "
                "write_own_text(*sys.argv[1:])"
            )
            how = [str(self.model), calibration.model_dump_json(), self.device, str(file)]
            run_process([sys.executable, "-c", script, *how])
        return str(file)

    def make_work(self) -> None:
        """Make the directory of what is finished."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UsageError(
                f"the work directory {self.work} cannot be made: {fault.strerror}",
                "give another --work",
            ) from fault

    def folder(self, pattern: Pattern, entry: Entry) -> Path:
        """Where a cell is pruned to; its facts are beside it, with ``.json`` at the end."""
        return self.work / re.sub(r"[^\w.+=-]+", "-", f"{pattern} {entry.text}").strip("-")

    def finished(self, pattern: Pattern, entry: Entry) -> MethodRow | None:
        """The row of a cell that an earlier run measured in the same way."""
        folder = self.folder(pattern, entry)
        row = self._read(folder.name, MethodRow, pattern=str(pattern), method=entry.text)
        return None if self.keep and not folder.is_dir() else row

    def check(self, cells: Collection[tuple[Pattern, Entry]]) -> None:
        """Let prune plan each method once, which reads no weight, before hours are spent."""
        for pattern, entry in {entry: (pattern, entry) for pattern, entry in cells}.values():
            run_secateur([*self._prune(pattern, entry), "--dry-run"])

    def dense(self) -> AccuracyResult:
        """How the dense model reads the evaluation text."""
        found = self._read("dense", AccuracyResult)
        if found is not None:
            return found
        self.say(f"dense: {self.model}")
        result = measure_accuracy([self.model], self.evaluation, device=self.device)
        self._write("dense", result.to_json())
        return result

    def passes(self) -> tuple[float, ...]:
        """The timings of two dense passes so far."""
        return self._read("passes", tuple[float, ...]) or ()

    def time_passes(self) -> None:
        """Time two dense passes once more."""
        self.say("two dense passes, to compare times with")
        text = self.calibration
        arguments = [str(self.model), self.text, text.samples, text.length, text.seed, self.device]
        script = (
            "import json, sys; from secateur.bench.calibrated_work import time_dense_passes; "
            "print(time_dense_passes(*json.loads(sys.argv[1])))"
        )
        printed, _ = run_process([sys.executable, "-c", script, json.dumps(arguments)])
        self._write("passes", [*self.passes(), float(printed)])
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
        self._write(folder.name, row.model_dump(mode="json"), **name)
        return row

    def _accuracy(self, folder: Path) -> ModelAccuracy:
        try:
            result = measure_accuracy(
                [folder], self.evaluation, against=self.model, device=self.device
            )
        finally:
            if not self.keep:
                shutil.rmtree(folder)
        return result.models[0]

    def _prune(self, pattern: Pattern, entry: Entry) -> list[str]:
        text, output = self.calibration, self.folder(pattern, entry)
        calibration = ["--data", self.text, "--samples", str(text.samples)]
        calibration += ["--length", str(text.length), "--seed", str(text.seed)]
        how = ["--pattern", str(pattern), "--compat", self.compat, "--device", self.device]
        return ["prune", str(self.model), "-o", str(output), *entry.arguments(), *how, *calibration]

    def _read(self, name: str, kind: type[Item], **more: str) -> Item | None:
        """What is finished under this name and identity; None: nothing is."""
        identity = self.identity | more
        try:
            kept = json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))
            if kept["identity"] != identity:
                return None
            return TypeAdapter(kind).validate_python(kept["result"])
        except (OSError, ValueError, LookupError, TypeError):
            return None  # damaged, or of another version: measured again

    def _write(self, name: str, result: Any, **more: str) -> None:
        kept = {"identity": self.identity | more, "result": result}
        write_json(self.work / f"{name}.json", kept)


def _text_sha256(data: str) -> str | None:
    """The hash of a text; None for one that the model writes, or for none."""
    if data in ("self", "none"):
        return None
    if Path(data).is_file():
        return file_sha256(Path(data))
    return hashlib.sha256(read_text(data).encode()).hexdigest()


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
