"""Which pattern, method and value type to take: a search for the front, within a time budget.

Speed depends on pattern and value type only, so each pair is timed once, on weights pruned by
magnitude. Then the pairs that may be the answer are pruned by each method and read the evaluation
text, the most promising first, until the time is spent. What is finished is kept; a repeated
search goes on from there.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from secateur import recipe
from secateur.bench.accuracy import measure_accuracy
from secateur.bench.latency import measure_latency
from secateur.bench.method_results import Entry
from secateur.bench.processes import run_secateur
from secateur.bench.results import Estimate, _Facts, _Result
from secateur.bench.subjects import model_bytes
from secateur.bench.work import Work
from secateur.errors import SecateurError, UsageError
from secateur.pattern import Pattern
from secateur.recipe import ValueType
from secateur.source import resolve_model

PATTERNS = ("2:4", "4:8", "50%@16x1")
VALUES: tuple[ValueType, ...] = ("bf16", "int8", "int4")


class Speed(_Facts):
    """How fast a pattern and value type are, whatever the method.

    Attributes:
        decode_speedup, prefill_speedup: over the model as it is.
        bytes: of the packed model's weight files; dense_bytes: of the model as it is.
    """

    decode_speedup: Estimate
    prefill_speedup: Estimate
    bytes: int
    dense_bytes: int


class Point(_Facts):
    """One combination; perplexity_ratio is None until its quality is measured.

    Attributes:
        method: None if no method was tried with this pattern and value type.
        speed: None if they cannot be packed or run: `error` says why.
        perplexity_ratio: to the model as it is.
        seconds: of pruning and packing.
    """

    pattern: str
    values: ValueType
    method: str | None = None
    speed: Speed | None = None
    perplexity_ratio: Estimate | None = None
    kl: Estimate | None = None
    seconds: float | None = None
    error: str | None = None


class TuneResult(_Result):
    """The result of ``secateur tune``.

    Attributes:
        target: speedup (decode, at least) or increase (of perplexity, at most).
        limit: of the target.
        budget_seconds, spent_seconds: of this call; finished: whether all was tried in time.
        points: everything that was tried.
        best: the one to take, which is on the front; None if none keeps the limit.
        recipe: what `secateur run` makes it with; None without best.
    """

    schema_: Literal["secateur/tune/1"] = Field("secateur/tune/1", alias="schema")
    model: str
    target: Literal["speedup", "increase"]
    limit: float
    budget_seconds: float
    spent_seconds: float
    finished: bool
    points: tuple[Point, ...]
    best: Point | None
    recipe: dict[str, Any] | None

    @property
    def front(self) -> list[Point]:
        """The points that no other one beats in perplexity, decoding speed and size at once."""
        return find_front(self.points)


@dataclass(frozen=True)
class Target:
    """What is asked for: one of the two.

    Attributes:
        speedup: of decoding over the model as it is, at least.
        increase: of perplexity, at most: 0.1 is a tenth more.
    """

    speedup: float | None = None
    increase: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError unless one limit is given, and is one."""
        if (self.speedup is None) == (self.increase is None):
            raise UsageError(
                "a search needs one target", "give --target-speedup or --max-ppl-increase"
            )
        if (self.speedup or 1.0) <= 0:
            raise UsageError(f"a speed-up of {self.speedup}", "ask for more than 0, such as 1.8")

    def kept(self, point: Point) -> bool:
        """Whether a measured point keeps the limit."""
        if point.speed is None or point.perplexity_ratio is None:
            return False
        if self.speedup is not None:
            return point.speed.decode_speedup.value >= self.speedup
        assert self.increase is not None
        return point.perplexity_ratio.value <= 1 + self.increase

    def best(self, points: Sequence[Point]) -> Point | None:
        """Of those that keep the limit the one with the best of the other number."""
        kept = [point for point in points if self.kept(point)]
        by_speed = self.increase is not None
        return min(kept, key=lambda point: merits(point)[:: -1 if by_speed else 1], default=None)

    def order(self, speeds: dict[tuple[str, ValueType], Speed]) -> list[tuple[str, ValueType]]:
        """The pairs that may be the answer, the most promising first."""
        if self.speedup is not None:  # the quality of the largest is the best, mostly
            able = [
                pair for pair, speed in speeds.items() if speed.decode_speedup.value >= self.speedup
            ]
            return sorted(able, key=lambda pair: -speeds[pair].bytes)
        return sorted(speeds, key=lambda pair: -speeds[pair].decode_speedup.value)


def merits(point: Point) -> tuple[float, float]:
    """Perplexity ratio and time for a token: less is better."""
    assert point.speed is not None
    assert point.perplexity_ratio is not None
    return point.perplexity_ratio.value, 1 / point.speed.decode_speedup.value


def find_front(points: Sequence[Point]) -> list[Point]:
    """See `TuneResult.front`."""

    def costs(point: Point) -> tuple[float, ...]:
        assert point.speed is not None
        return *merits(point), float(point.speed.bytes)

    known = [point for point in points if point.speed and point.perplexity_ratio]
    return [
        point
        for point in known
        if not any(
            costs(other) != costs(point)
            and all(a <= b for a, b in zip(costs(other), costs(point), strict=True))
            for other in known
        )
    ]


def tune(
    model: str,
    target: Target,
    *,
    output: str,
    patterns: Sequence[str] = PATTERNS,
    methods: Sequence[str] = (recipe.Prune().method,),
    values: Sequence[ValueType] = VALUES,
    calibration: recipe.Calibration | None = None,
    evaluation: recipe.Accuracy | None = None,
    latency: recipe.Latency | None = None,
    budget_seconds: float = 7200.0,
    work: str | Path = "tune.work",
    device: str = "auto",
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
    update: Callable[[Sequence[Point]], None] = lambda _: None,
) -> TuneResult:
    """Search for the combination that keeps a target and is best in the other number.

    Args:
        model: model directory, .gguf file or hub name.
        target: what is asked for.
        output: what the recipe names as its output.
        patterns, values: to combine.
        methods: as `secateur.bench.method_results.Entry` reads them, the most promising first.
        calibration, evaluation, latency: as in a recipe.
        budget_seconds: nothing new is begun after it.
        work: directory for what is finished.
        device: of pruning and evaluation.
        say: called with a line for everything that is begun.
        update: called with all points whenever there is a new one.

    Raises:
        UsageError: a pattern, method or value type is unknown.
        ModelError: the model or a text is missing or unsupported.
    """
    calibration = calibration or recipe.Calibration()
    evaluation = evaluation or recipe.Accuracy(windows=16)
    latency = latency or recipe.Latency()
    entries = [Entry.parse(text) for text in methods]
    pairs = [(str(Pattern.parse(text)), kind) for text in patterns for kind in values]
    settings = {"latency": latency.model_dump(mode="json")}
    place = Work(Path(work), resolve_model(model), calibration, evaluation, device, settings, say)
    place.make()
    search = _Search(place, latency, say)
    clock = _Clock(budget_seconds)
    failed: list[Point] = []
    speeds = {}
    for pattern, kind in pairs:
        if clock.spent:
            break
        found = search.speed(pattern, kind)
        if isinstance(found, str):
            failed.append(Point(pattern=pattern, values=kind, error=found))
            update(failed)
        else:
            speeds[pattern, kind] = found
    search.clear("pruned-*magnitude")
    points = list(failed)
    left = [(pair, entry) for pair in target.order(speeds) for entry in entries]
    for (pattern, kind), entry in left:
        if clock.spent:
            break
        points.append(search.point(pattern, kind, entry, speeds[pattern, kind]))
        update(points)
    if not clock.spent:
        search.clear("pruned-*")
    tried = {(point.pattern, point.values) for point in points}
    finished = len(speeds) == len(pairs) - len(failed) and len(points) == len(failed) + len(left)
    points += [
        Point(pattern=pattern, values=kind, speed=speed)
        for (pattern, kind), speed in speeds.items()
        if (pattern, kind) not in tried
    ]
    best = target.best(points)
    return TuneResult(
        command=command,
        environment=place.environment,
        dtype="float32",
        notes=(f"speed-ups are over {model} as it is stored, on the same engine",),
        model=model,
        target="speedup" if target.speedup is not None else "increase",
        limit=target.speedup if target.speedup is not None else float(target.increase or 0),
        budget_seconds=budget_seconds,
        spent_seconds=clock.seconds,
        finished=finished,
        points=tuple(points),
        best=best,
        recipe=_recipe(model, output, calibration, best) if best else None,
    )


class _Clock:
    def __init__(self, budget: float) -> None:
        self._begun, self._budget = time.monotonic(), budget

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def spent(self) -> bool:
        return self.seconds >= self._budget


class _Search:
    """Prunes, packs and measures one combination after the other; keeps what is finished."""

    def __init__(self, work: Work, latency: recipe.Latency, say: Callable[[str], None]) -> None:
        self.work, self.latency, self.say = work, latency, say

    def speed(self, pattern: str, kind: ValueType) -> Speed | str:
        """The speed of a pair, or why it has none."""
        name = _file_name("speed", pattern, kind)
        if (found := self.work.read(name, Speed)) is not None:
            return found
        self.say(f"{pattern} {kind}: speed")
        try:
            packed = self._pack(pattern, "magnitude", kind, quantize="rtn")
            result = measure_latency([packed], self.latency, against=self.work.model)
        except SecateurError as fault:
            return fault.what
        finally:
            self.clear("packed*")
        point = result.models[0].points[0]
        assert point.decode_speedup is not None
        assert point.prefill_speedup is not None
        assert result.baseline is not None
        speed = Speed(
            decode_speedup=point.decode_speedup,
            prefill_speedup=point.prefill_speedup,
            bytes=result.models[0].bytes,
            dense_bytes=model_bytes(self.work.model),
        )
        self.work.write(name, speed.model_dump(mode="json"))
        return speed

    def point(self, pattern: str, kind: ValueType, entry: Entry, speed: Speed) -> Point:
        """A combination with its quality; a failure is a point, too, but is not kept."""
        name = _file_name("point", pattern, kind, entry.text)
        known: dict[str, Any] = {"pattern": pattern, "values": kind, "method": entry.text}
        if (found := self.work.read(name, Point)) is not None:
            return found.model_copy(update={"speed": speed})
        self.say(f"{pattern} {kind} {entry.text}: quality")
        begun = time.monotonic()
        try:
            packed = self._pack(pattern, entry.text, kind)
            seconds = time.monotonic() - begun
            result = measure_accuracy(
                [packed], self.work.evaluation, against=self.work.model, device=self.work.device
            )
        except SecateurError as fault:
            return Point(**known, speed=speed, error=fault.what)
        finally:
            self.clear("packed*")
        quality = result.models[0]
        point = Point(
            **known,
            speed=speed,
            perplexity_ratio=quality.perplexity_ratio,
            kl=quality.kl,
            seconds=seconds,
        )
        self.work.write(name, point.model_dump(mode="json"))
        return point

    def _pack(self, pattern: str, method: str, kind: ValueType, quantize: str = "gptq") -> Path:
        """The model pruned and packed; the pruned one stays for other value types."""
        work, entry = self.work, Entry.parse(method)
        pruned = work.path / _file_name("pruned", pattern, entry.text)
        if not pruned.is_dir():
            how = ["--pattern", pattern, *work.calibrated()]
            run_secateur(["prune", str(work.model), "-o", str(pruned), *entry.arguments(), *how])
        packed = work.path / "packed"
        flags = ["--values", kind, *(["--quantize", quantize] if kind.startswith("int") else [])]
        run_secateur(["compile", str(pruned), "-o", str(packed), "--overwrite", *flags])
        return packed

    def clear(self, names: str) -> None:
        """Remove directories that are not needed any more."""
        for path in self.work.path.glob(names):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _recipe(
    model: str, output: str, calibration: recipe.Calibration, best: Point
) -> dict[str, Any]:
    """A recipe that makes a point; only what differs from the defaults, and what was chosen."""
    assert best.method is not None
    entry = Entry.parse(best.method)
    prune: dict[str, Any] = {"method": entry.chain, "pattern": best.pattern}
    if entry.allocate:
        prune["allocate"] = entry.allocate
    return {
        "version": 1,
        "model": model,
        "output": output,
        "calibration": calibration.model_dump(mode="json", exclude_defaults=True),
        "prune": prune,
        "compile": {"format": "packed", "values": best.values},
    }


def _file_name(*words: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", " ".join(words)).strip("-")
