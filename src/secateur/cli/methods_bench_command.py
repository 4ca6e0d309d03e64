"""``secateur bench methods``."""

from __future__ import annotations

import math
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from secateur.cli import Json, bench
from secateur.cli.bench_command import (
    Device,
    Output,
    Quiet,
    _check_output,
    _console,
    _deliver,
    command_line,
)
from secateur.errors import ModelError, UsageError

if TYPE_CHECKING:
    from secateur.bench.method_results import MethodRow, MethodsResult
    from secateur.bench.results import Estimate


@bench.command("methods")
def methods(
    model: Annotated[str, Argument(help="Model directory, .gguf file or Hugging Face hub name.")],
    patterns: Annotated[str, Option(help="Patterns, with commas: 2:4,50%,70%.")] = "2:4",
    methods: Annotated[
        str,
        Option(
            help="Methods, with commas; each a chain, then :ALLOCATION and [STEP.KEY=VALUE,…] "
            "where wanted: wanda+lsq,alps:owl,sparsegpt[sparsegpt.percdamp=0.05]."
        ),
    ] = "magnitude,wanda,sparsegpt",
    data: Annotated[str, Option(help="Calibration text, as in `secateur prune`.")] = "self",
    samples: Annotated[int, Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, Option(help="Decides which calibration text is drawn.")] = 0,
    evaluation: Annotated[
        str, Option("--eval", help="Evaluation text, as in `secateur bench accuracy`.")
    ] = "pydoc",
    window: Annotated[int, Option(help="Tokens per evaluation window.")] = 512,
    windows: Annotated[int, Option(help="Read this many windows.")] = 16,
    compat: Annotated[
        str, Option(help="exact, or reference: count as the authors' code does.")
    ] = "exact",
    device: Device = "auto",
    work: Annotated[
        Path | None,
        Option(
            help="Directory for what is finished, by which a repeated command goes on.",
            show_default="<output name>.work, or methods.work",
        ),
    ] = None,
    keep: Annotated[bool, Option("--keep", help="Keep the pruned models there.")] = False,
    output: Output = None,
    markdown_file: Annotated[
        Path | None, Option("--markdown", help="Also write Markdown tables to this file.")
    ] = None,
    merge: Annotated[
        list[Path] | None,
        Option(help="JSON of an earlier run, to stand in the Markdown too; repeatable."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare pruning methods under one calibration and one evaluation; goes on where it stopped.

    Exits with 3 if a cell of the table failed; the others are measured all the same.
    """
    from secateur.bench.method_results import MethodsResult, split_entries
    from secateur.bench.methods import measure_methods
    from secateur.recipe import Accuracy, Calibration, Prune, validate

    text = validate(
        Calibration,
        {"data": data, "samples": samples, "length": length, "seed": seed},
        "calibration",
    )
    reading = validate(
        Accuracy, {"data": evaluation, "window": window, "windows": windows}, "bench methods"
    )
    counting = validate(Prune, {"compat": compat}, "bench methods").compat
    _check_output(output)
    _check_output(markdown_file)
    if merge and markdown_file is None:
        raise UsageError("--merge adds to the Markdown, and there is none", "add --markdown FILE")
    earlier = [MethodsResult.read(path) for path in merge or []]
    if work is None:
        work = output.with_suffix(".work") if output else Path("methods.work")
    # Ended like by Ctrl-C, so that the process at work ends too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = measure_methods(
            model,
            split_entries(patterns),
            split_entries(methods),
            text,
            reading,
            compat=counting,
            device=device,
            work=work,
            keep=keep,
            command=command_line(),
            say=(lambda _: None) if quiet else _say,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    _deliver(result.to_json(), output, json)
    if not json:
        show_methods(result)
    if markdown_file is not None:
        markdown_file.write_text(markdown([*earlier, result]), encoding="utf-8")
    if result.failed:  # not raised: the result is printed, and has the reasons
        failed = f"{len(result.failed)} of {len(result.rows)} cells failed"
        print(f"error: {failed}; the table says why", file=sys.stderr)
        raise typer.Exit(ModelError.exit_code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show_methods(result: MethodsResult) -> None:
    """Print the table, the best of each pattern first, with the facts needed to repeat it."""
    from rich.table import Table

    table = Table("pattern", "method", box=None)
    for title in TITLES:
        table.add_column(title, justify="right")
    for row in (dense_row(result), *result.rows):
        table.add_row(row.pattern, row.method.replace("[", "\\["), *cells(row))
    console = _console()
    console.print(table)
    for line in describe(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


TITLES = (
    "perplexity",
    "/ dense",
    "KL, nats/token",
    "top-1",
    "layer error",
    "worst",
    "zeros",
    "seconds",
    "/ 2 passes",
    "peak GiB",
)


def cells(row: MethodRow) -> list[str]:
    """The numbers of a row as text, in the order of `TITLES`; a failed one has none."""
    own = row.accuracy
    if own is None:
        return ["failed", *[""] * (len(TITLES) - 1)]
    return [
        _estimate(own.perplexity),
        _estimate(own.perplexity_ratio),
        _estimate(own.kl),
        _estimate(own.top1_agreement),
        _number(row.error_mean),
        _number(row.error_worst),
        "" if row.sparsity is None else f"{100 * row.sparsity:.2f} %",
        "" if row.seconds is None else f"{row.seconds:.1f}",
        "" if row.relative_seconds is None else f"{row.relative_seconds:.1f}x",
        "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 2**30:.2f}",
    ]


def dense_row(result: MethodsResult) -> MethodRow:
    """The dense model as a row."""
    from secateur.bench.method_results import MethodRow

    return MethodRow(pattern="dense", method="dense", accuracy=result.dense)


def describe(result: MethodsResult) -> list[str]:
    """The facts needed to read the numbers and to repeat them, a line each."""
    calibration, text, machine = result.calibration, result.text, result.environment
    passes = result.dense_passes_seconds
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    place = "" if machine.device == "cpu" else f"{machine.device}, "
    return [
        f"calibration: {calibration.samples} x {calibration.length} tokens of {calibration.data}, "
        f"seed {calibration.seed}; compat {result.compat}",
        f"evaluation: {result.windows} windows of {result.window} tokens of {text.name}, stride "
        f"{result.stride}, {result.predicted_tokens} predicted tokens, {result.dtype}; ± is one "
        f"standard error over windows; sha256 of the evaluated ids {text.sha256}",
        f"machine: {place}{machine.cpu}, {machine.cores} cores, {machine.threads} threads; "
        f"{versions}; {machine.date}",
        f"2 passes: two dense passes take {statistics.median(passes):.1f} s, the median of "
        f"{', '.join(f'{seconds:.1f}' for seconds in passes)}",
        *([f"command: {result.command}"] if result.command else []),
        *(f"note: {note}" for note in result.notes),
        *(f"failed: {row.pattern} {row.method}: {row.error}" for row in result.failed),
    ]


def markdown(results: Sequence[MethodsResult]) -> str:
    """Results as Markdown: of several, first their perplexities side by side, then each.

    Raises:
        UsageError: they are of different models or evaluations, so that no two numbers compare.
    """
    first = results[0]
    for other in results[1:]:
        if _compared(other) != _compared(first):
            raise UsageError(
                "the results to merge are of different models, evaluation texts or windows",
                "merge results of one model and one evaluation",
            )
    lines = [f"# Pruning methods compared on {Path(first.model).name}", ""]
    if len(results) > 1:
        lines += _side_by_side(results)
    for result in results:
        if len(results) > 1:
            lines += [f"## Calibrated on {label(result)}", ""]
        lines += [*(f"- {line}" for line in describe(result)), ""]
        for pattern in dict.fromkeys(row.pattern for row in result.rows):
            rows = [dense_row(result), *(row for row in result.rows if row.pattern == pattern)]
            lines += [f"{'##' if len(results) == 1 else '###'} {pattern}", ""]
            lines += _table(("method", *TITLES), [[row.method, *cells(row)] for row in rows])
    return "\n".join(lines)


def label(result: MethodsResult) -> str:
    """The calibration of a result as a title."""
    text = result.calibration
    compat = "" if result.compat == "exact" else f", compat {result.compat}"
    return f"{Path(text.data).name}, {text.samples} x {text.length}, seed {text.seed}{compat}"


def _compared(result: MethodsResult) -> tuple[object, ...]:
    return result.model_sha256, result.text.sha256, result.window, result.stride, result.dtype


def _side_by_side(results: Sequence[MethodsResult]) -> list[str]:
    """A table for each pattern: methods down, calibrations across; of two equal ones the later."""
    tables: dict[str, dict[str, dict[str, MethodRow]]] = {}
    for result in results:
        for row in result.rows:
            tables.setdefault(row.pattern, {}).setdefault(row.method, {})[label(result)] = row
    labels = list(dict.fromkeys(map(label, results)))
    dense = _number(results[0].dense.perplexity.value)
    lines = [f"Perplexity (and its ratio to dense, {dense}) under each calibration:", ""]
    for pattern, methods in tables.items():
        ranked = sorted(
            methods.items(), key=lambda item: min(r.perplexity for r in item[1].values())
        )
        rows = [[name, *(_perplexity(of.get(key)) for key in labels)] for name, of in ranked]
        lines += [f"## {pattern}", "", *_table(("method", *labels), rows)]
    return lines


def _best(rows: Iterable[MethodRow]) -> float:
    return min(row.perplexity for row in rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *["---:"] * (len(titles) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (titles, ruler, *rows)]
    return [*(f"| {' | '.join(row)} |" for row in escaped), ""]


def _perplexity(row: MethodRow | None) -> str:
    if row is None:
        return ""
    if row.accuracy is None or row.accuracy.perplexity_ratio is None:
        return "failed"
    return f"{_number(row.perplexity)} ({row.accuracy.perplexity_ratio.value:.3f}x)"


def _estimate(estimate: Estimate | None) -> str:
    return "" if estimate is None else _number(estimate.value, estimate.standard_error)


def _number(value: float | None, error: float | None = None) -> str:
    """Four significant digits, and the error to as many places."""
    if value is None:
        return ""
    places = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 3
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")
