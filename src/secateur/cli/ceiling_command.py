"""``secateur bench ceiling``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, bench
from secateur.cli.bench_command import Output, _check_output, _console, _deliver
from secateur.cli.kernels_bench_command import _numbers

if TYPE_CHECKING:
    from secateur.bench.ceiling import CeilingResult


@bench.command("ceiling")
def ceiling(
    model: Annotated[str, Argument(help="A config.json, or a directory that holds one.")],
    pattern: Annotated[str, Option(help="What is kept: 2:4, 50%, 50%@8x1, dense.")] = "2:4",
    values: Annotated[
        str, Option(help="Type of the kept values: fp32, tf32, bf16, fp16, int8, fp8, int4.")
    ] = "bf16",
    group_size: Annotated[
        int | None, Option(min=1, help="Dense weights to an fp16 scale.", show_default="no scales")
    ] = None,
    batch: Annotated[str, Option(help="Sequences at once, with commas.")] = "1,16,64",
    context: Annotated[str, Option(help="Positions of each, with commas.")] = "0,8192",
    bandwidth: Annotated[
        float | None, Option(help="GB/s of the GPU's memory.", show_default="no tokens/s")
    ] = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Compute how much faster pruning can make decoding at most, from the bytes that it reads."""
    from secateur.bench.ceiling import compute_ceiling

    _check_output(output)
    chosen: Any = values
    result = compute_ceiling(
        model,
        pattern,
        chosen,
        batches=tuple(_numbers(batch, "--batch")),
        contexts=tuple(_numbers(context, "--context")),
        group_size=group_size,
        bandwidth_gb_per_s=bandwidth,
    )
    _deliver(result.to_json(), output, json)
    if not json:
        show_ceiling(result)


TITLES = ("batch", "context", "GB dense bf16", "GB", "of it cache", "x bf16 dense", "x same dense")


def cells(result: CeilingResult) -> list[list[str]]:
    """The numbers of each row as text: `TITLES`, then tokens/s if a bandwidth was given."""
    return [
        [
            str(row.batch),
            str(row.context),
            f"{row.dense_bytes / 1e9:.2f}",
            f"{row.bytes / 1e9:.2f}",
            f"{row.cache_bytes / 1e9:.2f}",
            f"{row.speedup:.2f}",
            f"{row.same_type_speedup:.2f}",
            *([] if row.tokens_per_s is None else [f"{row.tokens_per_s:.0f}"]),
        ]
        for row in result.rows
    ]


def show_ceiling(result: CeilingResult) -> None:
    """Print a result as a table, with what it rests on."""
    from rich.table import Table

    table = Table(box=None)
    for title in (*TITLES, *(["tokens/s"] if result.bandwidth_gb_per_s else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for row in cells(result):
        table.add_row(*row)
    console = _console()
    console.print(table)
    each, weights = result.bytes_per_weight, result.weights
    for line in (
        f"{weights.prunable / 1e9:.3f} G weights as {result.pattern} {result.values}: "
        f"{each.total:.4f} bytes each (values {each.values:g}, positions {each.positions:g}, "
        f"scales {each.scales:g})",
        f"{(weights.head + weights.other) / 1e9:.3f} G weights stay bf16, "
        f"{weights.head / 1e9:.3f} G of them in the head; "
        f"the cache has {2 * weights.cache / 1024:g} KiB to a position, bf16",
        "computed from bytes, not measured: no kernel can be faster, and none need be as fast",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
