"""``secateur bench rivals``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from secateur.cli import Json, bench
from secateur.cli.bench_command import (
    Output,
    Quiet,
    _check_output,
    _console,
    _deliver,
    _where,
    command_line,
)
from secateur.progress import progress

if TYPE_CHECKING:
    from secateur.bench.rivals import RivalRow, RivalsResult


@bench.command("rivals")
def rivals(
    model: Annotated[str, Argument(help="Directory of the sparse model.")],
    against: Annotated[str, Option(help="Directory of the dense model, which the rivals run.")],
    files: Annotated[
        list[str] | None,
        Option("--file", help="The dense model as .gguf or .onnx; may be repeated."),
    ] = None,
    prompt: Annotated[int, Option(help="Prompt tokens of the prefill.")] = 128,
    new_tokens: Annotated[int, Option(help="Tokens decoded after it.")] = 32,
    batch: Annotated[int, Option(help="Sequences at once.")] = 1,
    rounds: Annotated[int, Option(help="Rounds of each process at least.")] = 5,
    min_seconds: Annotated[float, Option(help="Go on with rounds until this much time.")] = 3.0,
    passes: Annotated[int, Option(min=1, help="Processes of each rival, in turns.")] = 2,
    threads: Annotated[
        int | None, Option(min=1, help="CPU threads.", show_default="all cores")
    ] = None,
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure a sparse model beside its dense twin in other programs, each in its own process.

    llama.cpp, ONNX Runtime and OpenVINO run the files; vLLM runs where its command is found. What
    is not there is named, with the way to have it.
    """
    from secateur.bench.rivals import measure_rivals
    from secateur.recipe import Latency, validate

    settings = validate(
        Latency,
        {
            "prompt": prompt,
            "new_tokens": new_tokens,
            "batch": batch,
            "rounds": rounds,
            "min_seconds": min_seconds,
        },
        "bench rivals",
    )
    _check_output(output)
    with progress("processes", quiet) as tick:
        result = measure_rivals(
            model,
            against,
            settings,
            files=files or [],
            threads=threads,
            passes=passes,
            command=command_line(),
            progress=tick,
        )
    _deliver(result.to_json(), output, json)
    if not json:
        show_rivals(result)


def show_rivals(result: RivalsResult) -> None:
    """Print one table, what is absent, and the machine."""
    from rich.table import Table

    table = Table("model", "engine", box=None)
    for title in ("MB", "peak MB", "prefill, tokens/s", "x", "decode, tokens/s", "x"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.rows:
        if row.absent is None:
            table.add_row(row.path, row.engine, *_cells(row))
    console = _console()
    console.print(table)
    for line in (
        *(f"absent: {row.engine}, {row.path}: {row.absent}" for row in result.rows if row.absent),
        f"prompt {result.prompt}, new tokens {result.new_tokens}, batch {result.batch}, "
        f"{result.threads} threads; {result.passes} processes each, in turns; ± is one standard "
        "deviation over rounds; x: of the first row's rate",
        _where(result.environment, f"types: {result.dtype}"),
        *(f"note: {note}" for note in result.notes),
        *(f"{row.engine}, {row.path}: {note}" for row in result.rows for note in row.notes),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _cells(row: RivalRow) -> list[str]:
    cells = [f"{(row.bytes or 0) / 1e6:.0f}", f"{(row.peak_rss_bytes or 0) / 1e6:.0f}"]
    for rate, times in (
        (row.prefill_tokens_per_s, row.prefill_speedup),
        (row.decode_tokens_per_s, row.decode_speedup),
    ):
        cells.append(f"{rate.mean:.1f} ± {rate.stddev:.1f}" if rate else "")
        cells.append(f"{times.value:.2f}" if times else "baseline")
    return cells
