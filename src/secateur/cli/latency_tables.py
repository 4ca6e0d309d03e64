"""The tables of ``bench latency`` and ``bench rivals``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.cli.bench_command import _console, _where

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.bench.latency_results import LatencyResult, LayerTime, ModelLatency


def show_latency(result: LatencyResult) -> None:
    """Print a line for each model, load and phase, then layers, warnings and the machine."""
    console = _console()
    console.print(rates_table(result.everyone, result.baseline))
    if any(model.layers for model in result.everyone):
        console.print(_layers_table(result))
    for line in _facts(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def rates_table(models: tuple[ModelLatency, ...], baseline: ModelLatency | None) -> Table:
    """Tokens per second; prompt and batch stand in the table."""
    from rich.table import Table

    table = Table("model", "engine", "phase", box=None)
    for title in ("prompt", "batch", "tokens/s, mean ± σ", "min … max", "speed-up"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in models:
        name, ran = model.path, model.engine
        for point in model.points:
            for phase in ("prefill", "decode"):
                rate, speedup = point.rate(phase), point.speedup(phase)
                times = f"{speedup.value:.3f} ± {speedup.stddev:.3f}" if speedup else ""
                table.add_row(
                    name,
                    ran,
                    phase,
                    str(point.prompt),
                    str(point.batch),
                    f"{rate.mean:.2f} ± {rate.stddev:.2f}",
                    f"{rate.min:.2f} … {rate.max:.2f}",
                    "baseline" if model is baseline else times,
                )
                name = ran = ""
    return table


def _layers_table(result: LatencyResult) -> Table:
    """Linears of the same name in all blocks together: what computes them, bytes and time."""
    from rich.table import Table

    table = Table("model", "linears", "layout", "values", "inputs", box=None)
    for title in ("tokens", "MB", "µs, all", "GB/s", "x baseline"):
        table.add_column(title, justify="right", no_wrap=True)
    base = (
        {(one.name, one.tokens): one for one in result.baseline.layers} if result.baseline else {}
    )
    for model in result.everyone:
        path = model.path
        for key, group in _by_kind(model).items():
            kind, tokens, *form = key
            us, size = _microseconds(group), sum(one.nbytes for one in group)
            dense = [base[one.name, tokens] for one in group if (one.name, tokens) in base]
            times = f"{_microseconds(dense) / us:.2f}" if len(dense) == len(group) else ""
            table.add_row(
                path,
                f"{len(group)} {kind}",
                *form,
                str(tokens),
                f"{size / 1e6:.1f}",
                f"{us:.0f}",
                f"{size / us / 1e3:.1f}",
                "baseline" if model is result.baseline else times,
            )
            path = ""
    return table


_Kind = tuple[str, int, str, str, str]


def _by_kind(model: ModelLatency) -> dict[_Kind, list[LayerTime]]:
    """Linears by the last part of their name, tokens, layout, values and activations."""
    groups: dict[_Kind, list[LayerTime]] = defaultdict(list)
    for one in model.layers:
        kind = one.name.rpartition(".")[2]
        groups[kind, one.tokens, one.layout, one.values, one.activations].append(one)
    return groups


def _microseconds(layers: Sequence[LayerTime]) -> float:
    return sum(statistics.median(one.us.samples) for one in layers)


def _facts(result: LatencyResult) -> list[str]:
    reasons = {one.why for model in result.everyone for one in model.layers if one.why}
    warned = [
        f"warning: {model.path}: prompt {point.prompt}, batch {point.batch}: {text}"
        for model in result.everyone
        for point in model.points
        for text in point.warnings
    ]
    crossings = [
        f"{one.path}: {one.phase} after {one.prompt} tokens is the faster one {one.faster} a batch "
        f"of {one.batch:.1f}"
        for one in result.crossovers
    ]
    return [
        f"new tokens {result.new_tokens}; {result.rounds} interleaved rounds at least, "
        f"{result.measured_seconds:.1f} s in all; ± is one standard deviation over rounds",
        *crossings,
        f"{_where(result.environment, result.dtype)}, {result.environment.threads} threads, peak "
        f"memory of the process {result.peak_rss_bytes / 2**30:.2f} GiB",
        f"energy: {result.energy}",
        *(f"dense layout: {reason}" for reason in sorted(reasons)),
        *(f"note: {note}" for note in result.notes),
        *warned,
    ]
