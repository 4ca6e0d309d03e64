"""``secateur compile``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import Json, app, emit
from secateur.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from secateur.compile import PackReport


@app.command("compile")
def compile_(
    model: Annotated[
        Path, typer.Argument(metavar="DIR", help="Pruned model directory; any for --format dense.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")],
    format_: Annotated[
        str, typer.Option("--format", help="How to store it; see `secateur formats`.")
    ] = "packed",
    values: Annotated[
        str | None,
        typer.Option(help="Convert all weights to fp32, bf16 or fp16.  [default: the model's own]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    json: Json = False,
) -> None:
    """Store a pruned model in a smaller form: a bitmask and the weights that are left."""
    from secateur.compile import FORMATS

    if format_ not in FORMATS:
        raise UsageError(f"--format {format_!r} is not known", did_you_mean(format_, FORMATS))
    report = FORMATS[format_].write(model, output, values=values, overwrite=overwrite)
    if json:
        emit(report.model_dump(mode="json"))
    else:
        _print(report)


def _print(report: PackReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("linears")
    for heading in ("count", "shape", "pattern", "dense", "packed", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, tuple[int, int], str], list[Any]] = {}
    for name, layer in report.layers.items():
        group = re.sub(r".*\.\d+\.", "", name)  # the name within its decoder block
        groups.setdefault((group, layer.shape, layer.pattern), []).append(layer)
    for (group, shape, pattern), layers in groups.items():
        dense = sum(layer.dense_bytes for layer in layers)
        packed = sum(layer.packed_bytes for layer in layers)
        size = f"{shape[0]}x{shape[1]}"
        table.add_row(group, str(len(layers)), size, pattern, *_sizes(dense, packed))
    if report.layers:
        table.add_section()
        linears = _sizes(report.linears_dense_bytes, report.linears_packed_bytes)
        table.add_row("packed linears", str(len(report.layers)), "", "", *linears)
    table.add_row("whole model", "", "", "", *_sizes(report.dense_bytes, report.packed_bytes))
    console = Console()
    console.print(table)
    for name, reason in report.kept_dense.items():
        console.print(f"left dense: {name}: {reason}", markup=False, highlight=False)
    values = f" as {report.values}" if report.values else ""
    console.print(
        f"{report.output}: {_megabytes(report.packed_bytes)} of weights{values}, from "
        f"{_megabytes(report.source_bytes)} in {report.seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _sizes(dense: int, packed: int) -> tuple[str, str, str]:
    return _megabytes(dense), _megabytes(packed), f"{packed / dense:.3f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
