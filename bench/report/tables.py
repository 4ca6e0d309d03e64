"""The tables of a report: rows of text, the same on the page and in Markdown."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.bench.latency_results import LatencyResult, ModelLatency
from secateur.bench.method_results import MethodsResult
from secateur.bench.report.inputs import Source
from secateur.bench.report.subjects import Subject, front
from secateur.bench.results import AccuracyResult, Environment, Estimate, Spread
from secateur.bench.rivals import RivalsResult
from secateur.bench.serving_results import ServingResult

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """A table with a heading.

    Attributes:
        title: the heading.
        head: names of the columns; the first one names rows.
        rows: cells as text.
        says: what it takes to read it, or nothing.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    says: str = ""

    def is_text(self, column: int) -> bool:
        """Whether a column is read from the left: the first one, and those with words."""
        return column == 0 or any(row[column][:1].isalpha() for row in self.rows)


def tabulate(sources: Sequence[Source], subjects: Sequence[Subject]) -> list[Table]:
    """All tables that the results allow."""
    made = [_models(subjects), *_tasks(sources), *_loads(sources), *_linears(sources)]
    made += [*_methods(sources), *_absent(sources)]
    return [table for table in made if table.rows]


def verdicts(subjects: Sequence[Subject]) -> list[str]:
    """One sentence for each sparse model: what it costs, what it brings, what beats it."""
    said = []
    for subject in subjects:
        if subject.group != "sparse":
            continue
        parts = []
        base = subject.baseline
        if base is not None and subject.quality is not None and base is not subject.quality:
            parts.append(f"{subject.bytes / base.bytes:.2f} of the dense model's bytes")
        if subject.decode_speedup is not None:
            parts.append(f"decodes {ratio(subject.decode_speedup)} times as fast")
        if subject.prefill_speedup is not None:
            parts.append(f"reads prompts {ratio(subject.prefill_speedup)} times as fast")
        quality = subject.quality
        if quality is not None and quality.perplexity_ratio is not None:
            parts.append(f"perplexity times {ratio(quality.perplexity_ratio)}")
        if quality is not None and quality.recovery is not None:
            kept = quality.recovery
            parts.append(
                f"{100 * kept.value:.1f} % of the accuracy on tasks "
                f"(95 %: {100 * kept.low:.1f} to {100 * kept.high:.1f})"
            )
        better = [other.name for other in front(subjects) if subject.worse_than(other)]
        if better:
            parts.append(f"beaten in speed, size and perplexity at once by {', '.join(better)}")
        said.append(f"{subject.name}: {'; '.join(parts) or 'not compared with anything'}.")
    return said


def environments(sources: Sequence[Source]) -> Table:
    """Where and when each result was made."""
    rows = []
    for source in sources:
        found = getattr(source.result, "environment", None)
        if isinstance(found, Environment):
            versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
            machine = f"{found.cpu}, {found.cores} cores, {found.ram_bytes / 2**30:.0f} GiB"
            device = "" if found.device == "cpu" else f", {found.device}"
            load = f"{found.load_average:.1f}"
            rows.append(
                [source.name, found.date, machine + device, str(found.threads), load, versions]
            )
    head = ["result", "when", "machine", "threads", "load before", "versions"]
    return Table("Environment", head, rows)


def notes(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """What the results remark: their names, and the remarks."""
    return [
        (source.name, note) for source in sources for note in getattr(source.result, "notes", ())
    ]


def commands(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """The names of the results, and the commands that made them."""
    return [
        (source.name, command)
        for source in sources
        if (command := getattr(source.result, "command", ""))
    ]


def ratio(estimate: Estimate | None) -> str:
    """``1.41 ± 0.05``."""
    if estimate is None:
        return ABSENT
    spread = estimate.standard_error
    return number(estimate.value) + (f" ± {number(spread, 2)}" if spread else "")


def number(value: float | None, digits: int = 3) -> str:
    """Three digits that count; large numbers whole."""
    if value is None:
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _spread(spread: Spread | None) -> str:
    return ABSENT if spread is None else f"{number(spread.mean)} ± {number(spread.stddev, 2)}"


def _models(subjects: Sequence[Subject]) -> Table:
    head = ["model", "engine", "weights, MB", "perplexity", "x dense's", "KL", "same top-1"]
    head += ["recovery", "prefill, tokens/s", "x dense", "decode, tokens/s", "x dense"]
    best = {one.name for one in front(subjects)}
    rows = []
    for subject in subjects:
        quality = subject.quality
        kept = quality.recovery if quality else None
        rows.append(
            [
                subject.name + (" *" if subject.name in best and len(best) > 1 else ""),
                subject.engine or ABSENT,
                f"{subject.bytes / 1e6:.0f}",
                number(quality.perplexity.value, 4) if quality else ABSENT,
                ratio(quality.perplexity_ratio) if quality else ABSENT,
                number(quality.kl.value) if quality and quality.kl else ABSENT,
                f"{100 * quality.top1_agreement.value:.1f} %"
                if quality and quality.top1_agreement
                else ABSENT,
                f"{100 * kept.value:.1f} %" if kept else ABSENT,
                _spread(subject.prefill),
                ratio(subject.prefill_speedup),
                _spread(subject.decode),
                ratio(subject.decode_speedup),
            ]
        )
    says = (
        "* no other model here is at once as small, as fast and as good. Speeds of different runs, "
    )
    says += "and of different engines, compare only as far as the machine was equally quiet."
    return Table("Models", head, rows, says)


def _tasks(sources: Sequence[Source]) -> list[Table]:
    tables = []
    for source in sources:
        if not isinstance(source.result, AccuracyResult):
            continue
        rows = [
            [
                model.path,
                task.name,
                str(task.items),
                f"{100 * task.acc.value:.1f} ± {100 * (task.acc.standard_error or 0):.1f} %",
                f"{100 * task.acc_norm.value:.1f} %" if task.acc_norm else ABSENT,
                f"{100 * task.recovery.value:.1f} % ({100 * task.recovery.low:.1f} to "
                f"{100 * task.recovery.high:.1f})"
                if task.recovery
                else ABSENT,
            ]
            for model in source.result.everyone
            for task in model.tasks
        ]
        head = ["model", "task", "items", "accuracy", "by length", "recovery (95 %)"]
        tables.append(Table("Zero-shot tasks", head, rows))
    return tables


def _loads(sources: Sequence[Source]) -> list[Table]:
    tables = []
    for source in sources:
        result = source.result
        if not isinstance(result, ServingResult):
            continue
        head = ["load", "requests", "failed", "output tokens/s", "goodput, requests/s"]
        keys = [f"{p}_{m}" for m in ("ttft", "tpot", "itl", "e2el") for p in ("p50", "p90", "p99")]
        head += [f"{key[4:].upper()} {key[:3]}, ms" for key in keys]
        rows = [
            [
                point.load,
                str(point.completed),
                str(point.failed),
                number(point.output_throughput),
                number(point.request_goodput),
                *(number(point.ms(key)) for key in keys),
            ]
            for point in result.points
        ]
        says = f"{result.data} prompts, {result.api}"
        says += f"; knee at {result.knee} at once" if result.knee else ""
        says += f"; limits {result.slo}" if result.slo else ""
        tables.append(Table(f"Under load: {result.model}", head, rows, says + "."))
    return tables


def _linears(sources: Sequence[Source]) -> list[Table]:
    """Time and bytes of each kind of linear, and what computes it."""
    tables = []
    for source in sources:
        result = source.result
        if not isinstance(result, LatencyResult):
            continue
        rows = [row for model in result.everyone for row in _kinds(model)]
        head = [
            "model",
            "linears",
            "count",
            "shape",
            "layout",
            "tokens",
            "µs each",
            "MB",
            "why dense",
        ]
        says = "Median over layers of the mean time of a product, none of it in a cache before."
        tables.append(Table("Linears", head, rows, says))
    return tables


def _kinds(model: ModelLatency) -> list[list[str]]:
    groups = defaultdict(list)
    for layer in model.layers:
        kind = ".".join(part for part in layer.name.split(".") if not part.isdigit())
        what = f"{layer.layout}, {layer.values}"
        groups[kind, what, layer.rows, layer.columns, layer.tokens, layer.why].append(layer)
    rows = []
    for (kind, what, height, width, tokens, why), layers in groups.items():
        times = sorted(layer.us.mean for layer in layers)
        size = sum(layer.nbytes for layer in layers) / 1e6
        shape = f"{height} x {width}"
        row = [model.path, kind, str(len(layers)), shape, what, str(tokens)]
        rows.append([*row, number(times[len(times) // 2]), f"{size:.1f}", why or ABSENT])
    return rows


def _methods(sources: Sequence[Source]) -> list[Table]:
    tables = []
    for source in sources:
        result = source.result
        if not isinstance(result, MethodsResult):
            continue
        rows = [
            [
                row.pattern,
                row.method,
                number(row.perplexity, 4) if row.accuracy else row.error or ABSENT,
                ratio(row.accuracy.perplexity_ratio if row.accuracy else None),
                number(row.error_mean),
                number(row.seconds),
            ]
            for row in result.rows
        ]
        head = ["pattern", "method", "perplexity", "x dense's", "layer error", "seconds"]
        says = (
            f"Calibrated on {result.calibration.data}; dense {result.dense.perplexity.value:.2f}."
        )
        tables.append(Table(f"Pruning methods on {result.model}", head, rows, says))
    return tables


def _absent(sources: Sequence[Source]) -> list[Table]:
    rows = [
        [row.engine, row.absent]
        for source in sources
        if isinstance(source.result, RivalsResult)
        for row in source.result.rows
        if row.absent is not None
    ]
    return [Table("Not measured", ["program", "why, and the way to have it"], rows)]
