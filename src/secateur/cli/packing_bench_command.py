"""``secateur bench packing``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Option

from secateur.cli import Json, bench
from secateur.cli.bench_command import (
    Output,
    _check_output,
    _console,
    _deliver,
    _where,
    command_line,
)
from secateur.cli.kernels_bench_command import _times, _words
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.bench.packing import PackingResult


@bench.command("packing")
def packing(
    shape: Annotated[str, Option(help="ROWSxCOLUMNS, multiples of 32 and 128.")] = "2048x2048",
    values: Annotated[
        str, Option(help="Value types, with commas: bf16, fp16, int8.")
    ] = "bf16,int8",
    threads: Annotated[int, Option(help="Number of threads.")] = 1,
    rounds: Annotated[int, Option(help="Interleaved rounds.")] = 5,
    min_ms: Annotated[
        float, Option(help="Milliseconds of each conversion in a round, at least.")
    ] = 20,
    seed: Annotated[int, Option(help="Decides the weight and the order in rounds.")] = 0,
    output: Output = None,
    json: Json = False,
) -> None:
    """Time the conversions to and from the 2:4 layouts of GPUs, beside torch's own."""
    from secateur.bench.kernel_results import parse_shapes
    from secateur.bench.packing import PackingSettings, measure_packing
    from secateur.compile import cpu
    from secateur.compile.gpu import sm80, sm90
    from secateur.recipe import validate

    shapes = parse_shapes([shape])
    if len(shapes) != 1:
        raise UsageError(f"--shape {shape} is more than one shape", "write ROWSxCOLUMNS")
    settings = validate(
        PackingSettings,
        {
            "rows": shapes[0][0],
            "columns": shapes[0][1],
            "values": _words(values),
            "threads": threads,
            "rounds": rounds,
            "min_ms": min_ms,
            "seed": seed,
        },
        "bench packing",
    )
    _check_output(output)
    result = measure_packing(
        {"sm80": sm80, "sm90": sm90},
        cpu,
        settings,
        command=command_line(),
    )
    _deliver(result.to_json(), output, json)
    if not json:
        show_packing(result)


def show_packing(result: PackingResult) -> None:
    """Print a table, and the facts needed to read it."""
    from rich.table import Table

    table = Table("layout", "conversion", "values", box=None)
    for title in ("GB/s", "min … max", "x torch"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.conversions:
        spread = row.gb_per_s
        table.add_row(
            row.name,
            row.way,
            row.values,
            f"{row.median_gb_per_s:.2f}",
            f"{spread.min:.2f} … {spread.max:.2f}",
            _times(row.speedup),
        )
    console = _console()
    console.print(table)
    settings = result.settings
    for line in (
        f"{settings.rows} x {settings.columns}, 2:4; gigabytes of the dense weight a second; "
        f"{settings.rounds} interleaved rounds, {settings.threads} threads, {result.isa}; "
        "± is one standard error over rounds",
        _where(result.environment, result.dtype),
        *(f"note: {note}" for note in result.notes),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
