"""Pruning methods side by side: one calibration, one evaluation, a row per pattern and method.

Every cell of the table is a `secateur prune` in a process of its own, so that its seconds and its
peak memory are its own; what it made is read by `measure_accuracy` and deleted. A finished cell
leaves a JSON file with the identity of its measurement, by which a repeated run finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from secateur import recipe
from secateur.artifact import Manifest
from secateur.bench.accuracy import measure_accuracy
from secateur.bench.results import (
    AccuracyResult,
    Environment,
    ModelAccuracy,
    TextFacts,
    _Facts,
    _Result,
)
from secateur.calibration import calibration_inputs, read_text
from secateur.checkpoint import Checkpoint, file_sha256, save_tensors, write_json
from secateur.device import choose_device
from secateur.errors import EnvironmentFault, ModelError, SecateurError, UsageError
from secateur.model import StreamedModel
from secateur.pattern import Pattern
from secateur.source import resolve_model
from secateur.walk import Walk

if TYPE_CHECKING:
    import torch

Compat = Literal["exact", "reference"]
Item = TypeVar("Item")
EVALUATION = recipe.Accuracy(windows=16)

_ENTRY = re.compile(
    r"(?P<chain>[^:\[\]]+)(?::(?P<allocate>[^:\[\]]+))?(?:\[(?P<settings>[^\[\]]+)\])?"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands in one row of the table: ``CHAIN[:ALLOCATION]['['STEP.KEY=VALUE,…']']``."""

    text: str
    chain: str
    allocate: str | None = None
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an entry.

        Raises:
            UsageError: it is not of the form above. Whether the words are known is not asked.
        """
        text = text.strip()
        form = _ENTRY.fullmatch(text)
        listed = form["settings"] if form else None
        settings = tuple(map(str.strip, listed.split(","))) if listed else ()
        if form is None or not all("=" in setting for setting in settings):
            raise UsageError(
                f"the method {text!r} is not understood",
                "write a chain, then :ALLOCATION and [STEP.KEY=VALUE,…] where wanted: wanda+lsq, "
                "alps:owl, sparsegpt[sparsegpt.percdamp=0.05]",
            )
        return cls(text, form["chain"], form["allocate"], settings)

    def arguments(self) -> list[str]:
        """The flags of ``secateur prune`` that say the same."""
        allocate = ["--allocate", self.allocate] if self.allocate else []
        settings = [word for setting in self.settings for word in ("--set", setting)]
        return ["--method", self.chain, *allocate, *settings]


def split_entries(text: str) -> list[str]:
    """The parts between commas, those inside brackets excepted."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


class MethodRow(_Facts):
    """One pattern pruned by one method; everything else is None if the cell failed.

    Attributes:
        pattern, method: as they were asked for.
        error: why there is nothing; None if there is.
        accuracy: of the pruned model, against the dense one.
        sparsity: zeros among the weights of all linear layers in the blocks.
        error_mean, error_worst: of the layers' ‖(W - Ŵ)X‖² / ‖WX‖² on the calibration inputs.
        worst_layer: the layer that has the worst.
        seconds: of pruning, without the making of calibration text.
        relative_seconds: to the median of `MethodsResult.dense_passes_seconds`.
        peak_rss_bytes: of the process that pruned, its calibration text included.
        notes: what the manifest remarks, e.g. layers left dense.
    """

    pattern: str
    method: str
    error: str | None = None
    accuracy: ModelAccuracy | None = None
    sparsity: float | None = None
    error_mean: float | None = None
    error_worst: float | None = None
    worst_layer: str | None = None
    seconds: float | None = None
    relative_seconds: float | None = None
    peak_rss_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """To sort by: infinite where the cell failed."""
        return self.accuracy.perplexity.value if self.accuracy else float("inf")


class MethodsResult(_Result):
    """The result of ``bench methods``; docs/bench.md explains every key.

    Attributes:
        command: the command line that made it, if one did.
        model: as it was named.
        model_sha256: of its config and weight files.
        dense: how the unpruned model reads the same text.
        dense_passes_seconds: repeated timings of the work that no calibrated method can avoid.
        rows: by pattern as they were asked for, then by perplexity; failed cells last.
    """

    schema_: Literal["secateur/bench-methods/1"] = Field("secateur/bench-methods/1", alias="schema")
    command: str
    model: str
    model_sha256: dict[str, str]
    calibration: recipe.Calibration
    compat: Compat
    text: TextFacts
    window: int
    stride: int
    windows: int
    predicted_tokens: int
    dense: ModelAccuracy
    dense_passes_seconds: tuple[float, ...]
    rows: tuple[MethodRow, ...]

    @property
    def failed(self) -> tuple[MethodRow, ...]:
        """The rows without numbers."""
        return tuple(row for row in self.rows if row.error is not None)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``--output`` wrote.

        Raises:
            UsageError: the file is missing or is no such result.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as fault:
            raise UsageError(
                f"the result {path} cannot be read: {fault.strerror}", "check the path"
            ) from fault
        except ValidationError as fault:
            first = fault.errors()[0]
            raise UsageError(
                f"{path} is no result of bench methods: "
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                "name a file that `secateur bench methods -o FILE` wrote",
            ) from fault


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


def time_dense_passes(
    model: str, data: str, samples: int, length: int, seed: int, device: str = "auto"
) -> float:
    """Seconds of the least that a calibrated walk does: load, run twice and free every block.

    No statistics, no pruning. The time of a pass does not depend on what the text says; without
    any it is Python's language reference.
    """
    import torch

    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else None  # as prune
    streamed = StreamedModel(Checkpoint(model), place, dtype)
    text = "pydoc" if data == "none" else data
    inputs = calibration_inputs(
        streamed, recipe.Calibration(data=text, samples=samples, length=length, seed=seed)
    )
    begun = _now(place)
    walk = Walk(streamed, inputs, frozenset())
    for index in range(len(streamed.blocks)):
        streamed.load_block(index)
        walk.advance(index)
        walk.advance(index)
        streamed.free_block(index)
    return _now(place) - begun


def write_own_text(model: str, calibration: str, device: str, file: str) -> None:
    """Let a model write its calibration text, into a file that ``--data`` takes.

    Args:
        calibration: the recipe's section as JSON.
    """
    import torch

    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else None  # as prune
    streamed = StreamedModel(Checkpoint(model), place, dtype)
    wanted = recipe.Calibration.model_validate_json(calibration)
    save_tensors(Path(file), calibration_inputs(streamed, wanted))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.monotonic()


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
                "import sys; from secateur.bench.methods import write_own_text; "
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
            _secateur([*self._prune(pattern, entry), "--dry-run"])

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
            "import json, sys; from secateur.bench.methods import time_dense_passes; "
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
            answer, peak = _secateur([*self._prune(pattern, entry), "--overwrite"])
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


# On Linux a process starts with the peak memory of the one that forked it, and so does its own
# peak; ours may have held two models. So a small process stands between: it starts the command,
# and prints how it ended and its peak as a last line. Ctrl-C reaches the command by itself.
_LAUNCHER = """
import os, signal, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: os.kill(process.pid, signal.SIGTERM))
_, status, usage = os.wait4(process.pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
print(f"\\n{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss * unit}")
"""


def run_process(command: Sequence[str]) -> tuple[str, int]:
    """Run a command; what it printed, and its peak memory in bytes.

    Raises:
        SecateurError: it failed; with its own sentence if it printed one as JSON.
    """
    # As the secateur command does for itself: one rule for all that is compared.
    environment = {"GOMP_SPINCOUNT": "5000", **os.environ}
    with subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as launcher:
        try:
            stdout, stderr = launcher.communicate()
        except BaseException:
            launcher.terminate()  # passed on to the command
            launcher.wait()
            raise
    printed, _, report = stdout.rstrip("\n").rpartition("\n")
    code, peak = map(int, report.split())
    if code != 0:
        raise _fault(code, printed, stderr)
    return printed, peak


def _secateur(arguments: Sequence[str]) -> tuple[Any, int]:
    """Run ``secateur …`` for its JSON."""
    command = [sys.executable, "-m", "secateur", *arguments, "--quiet", "--json"]
    printed, peak = run_process(command)
    return json.loads(printed), peak


def _fault(code: int, stdout: str, stderr: str) -> SecateurError:
    try:
        said = json.loads(stdout)["error"]
    except (ValueError, LookupError, TypeError):
        if code < 0:
            return SecateurError(
                f"the process was ended by signal {-code}",
                "if the machine ran out of memory, use fewer --samples or a smaller --length",
            )
        last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
        return SecateurError(f"the process ended with exit code {code}: {last}")
    kinds = {kind.exit_code: kind for kind in (UsageError, ModelError, EnvironmentFault)}
    return kinds.get(code, SecateurError)(said["message"], said["fix"])
