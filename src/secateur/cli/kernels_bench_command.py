"""``secateur bench kernels``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from secateur.cli import Json, bench
from secateur.cli.bench_command import (
    Output,
    Quiet,
    _check_output,
    _console,
    _deliver,
    command_line,
)
from secateur.cli.methods_bench_command import _number, _table
from secateur.errors import UsageError
from secateur.progress import progress

if TYPE_CHECKING:
    from secateur.bench.gpu_kernels import GpuGroup, GpuKernelsResult
    from secateur.bench.kernel_results import KernelGroup, KernelRow, KernelsResult
    from secateur.bench.results import Estimate

_MIB = 2**20


@bench.command("kernels")
def kernels(
    shapes: Annotated[
        str,
        Option(help="Weights, with commas: smollm2, llama-1b, llama-8b, or ROWSxCOLUMNS."),
    ] = "smollm2",
    patterns: Annotated[
        str, Option(help="Patterns, with commas; the dense control is always there.")
    ] = "2:4,4:16,50%@16x1,50%@8x1,50%@4x1,75%@16x1,50%,80%,90%",
    values: Annotated[
        str, Option(help="Value types, with commas: fp32, bf16, fp16, int8, int4, fp8.")
    ] = "bf16,int8,int4",
    tokens: Annotated[str, Option(help="Tokens at once, with commas: 1,4,16,64,128,512.")] = "1",
    threads: Annotated[
        str | None, Option(help="Numbers of threads, with commas.", show_default="all cores")
    ] = None,
    peers: Annotated[
        str,
        Option(
            help="auto: those that suit the value type; none; or, with commas, torch-fp32, "
            "torch-bf16, ort-fp32, ort-int8, ort-nbits8, ort-nbits4 beside every type."
        ),
    ] = "auto",
    rounds: Annotated[int, Option(help="Interleaved rounds.")] = 5,
    min_ms: Annotated[float, Option(help="Milliseconds of each kernel in a round, at least.")] = 20,
    group_size: Annotated[
        int, Option(help="Weights that share a scale, ours and MatMulNBits': 32, 64 or 128.")
    ] = 64,
    cache_mib: Annotated[
        int | None,
        Option(
            help="MiB that the copies of each weight fill, lest caches help.",
            show_default="2 x last-level cache + 96",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        Option(help="Memory for weights, e.g. 8GiB.", show_default="half of what is free"),
    ] = None,
    roof_mib: Annotated[int, Option(help="MiB of the buffer whose reading is the roof.")] = 512,
    seed: Annotated[int, Option(help="Decides weights, masks and the order in rounds.")] = 0,
    device: Annotated[
        str, Option(help="cpu, or cuda: cuBLAS, cuSPARSELt, CUTLASS and Triton on a GPU.")
    ] = "cpu",
    spin: Annotated[
        bool, Option("--spin", help="Let ONNX Runtime's threads spin while a graph runs.")
    ] = False,
    output: Output = None,
    markdown_file: Annotated[
        Path | None, Option("--markdown", help="Also write Markdown tables to this file.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time our kernels against dense ones, torch and ONNX Runtime, taking turns."""
    from secateur.bench.kernel_results import KernelSettings, parse_shapes
    from secateur.device import choose_device
    from secateur.recipe import validate
    from secateur.sizes import parse_size

    chosen = choose_device(device)
    settings = validate(
        KernelSettings,
        {
            "shapes": parse_shapes(_words(shapes)),
            "patterns": _words(patterns),
            "values": _words(values),
            "tokens": _numbers(tokens, "--tokens"),
            "threads": _numbers(threads, "--threads") if threads else [_cores()],
            "peers": {"auto": None, "none": []}.get(peers, _words(peers)),
            "rounds": rounds,
            "min_ms": min_ms,
            "group_size": group_size,
            "cache_bytes": None if cache_mib is None else cache_mib * _MIB,
            "memory_bytes": None if memory is None else parse_size(memory),
            "roof_mib": roof_mib,
            "seed": seed,
            "spin": spin,
        },
        "bench kernels",
    )
    _check_output(output)
    _check_output(markdown_file)
    line = command_line()
    result: KernelsResult | GpuKernelsResult
    with progress("groups", quiet) as tick:
        if chosen.type == "cuda":
            from secateur.bench.gpu_kernels import Device, measure_gpu_kernels
            from secateur.compile.gpu.held import hold_each

            result = measure_gpu_kernels(
                hold_each, settings, Device.cuda(chosen), command=line, progress=tick
            )
        else:
            from secateur.bench.kernels import measure_kernels
            from secateur.compile import cpu

            result = measure_kernels(cpu, settings, command=line, progress=tick)
    _deliver(result.to_json(), output, json)
    if not json:
        show_kernels(result)
    if markdown_file is not None:
        markdown_file.write_text(markdown(result), encoding="utf-8")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UsageError(f"{flag} {text!r} are not whole numbers", f"e.g. {flag} 1,2") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0))


TITLES = (
    "layout",
    "inputs",
    "error",
    "B/weight",
    "µs",
    "min … max",
    "GB/s",
    "% roof",
    "GFLOP/s",
)


def references(group: KernelGroup | GpuGroup) -> list[str]:
    """What the kernels of a group are compared with, in the order of its columns."""
    named = dict.fromkeys(name for row in group.kernels for name in row.speedup)
    return [row.name for row in group.kernels if row.name in named]


def cells(row: KernelRow, compared: list[str]) -> list[str]:
    """The numbers of a row as text: `TITLES`, then its speed over each of ``compared``."""
    first = [row.layout or "", row.activations or ""]
    if row.us is None:
        return [*first, "", "", "absent", *[""] * (len(TITLES) - 5 + len(compared))]
    error = "" if row.relative_error is None else f"{row.relative_error:.1e}"
    roof = "" if row.roof_fraction is None else f"{100 * row.roof_fraction:.0f}"
    return [
        *first,
        error,
        f"{row.bytes_per_weight:.3f}",
        _number(row.median_us),
        f"{_number(row.us.min)} … {_number(row.us.max)}",
        _number(row.gb_per_s),
        roof,
        _number(row.gflops),
        *(_times(row.speedup.get(name)) for name in compared),
    ]


def _times(estimate: Estimate | None) -> str:
    """A ratio with its standard error."""
    if estimate is None:
        return ""
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2f}"
    return f"{estimate.value:.2f}{error}"


def show_kernels(result: KernelsResult | GpuKernelsResult) -> None:
    """Print the facts needed to read the numbers, and a table for each group."""
    from rich.table import Table

    console = _console()
    for line in describe(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for group in result.groups:
        compared = references(group)
        table = Table("kernel", TITLES[0], TITLES[1], box=None, title=group.title)
        table.title_justify = "left"
        for title in (*TITLES[2:], *(f"x {name}" for name in compared)):
            table.add_column(title, justify="right", no_wrap=True)
        for row in group.kernels:
            table.add_row(row.name, *cells(row, compared))
        console.print()
        console.print(table)


def describe(result: KernelsResult | GpuKernelsResult) -> list[str]:
    """The facts needed to read the numbers and to repeat them, a line each."""
    from secateur.bench.gpu_kernels import GpuKernelsResult

    own = _describe_gpu(result) if isinstance(result, GpuKernelsResult) else _describe_cpu(result)
    return [
        *own,
        *([f"command: {result.command}"] if result.command else []),
        *(f"note: {note}" for note in result.notes),
        *_remarks("note", "is stored dense: ", result, lambda row: row.why),
        *_remarks("absent", "", result, lambda row: row.absent),
    ]


def _versions(result: KernelsResult | GpuKernelsResult) -> str:
    return ", ".join(f"{name} {found}" for name, found in result.environment.versions.items())


def _describe_gpu(result: GpuKernelsResult) -> list[str]:
    machine, settings = result.environment, result.settings
    return [
        f"machine: {machine.device}, {machine.cpu}; {_versions(result)}; {machine.date}",
        f"weights: copies of each fill twice the {result.cache_bytes / _MIB:.0f} MiB of the GPU's "
        f"cache and are taken in turn; seed {settings.seed}; inputs {result.dtype}",
        f"rounds: {settings.rounds} in random order, at least {settings.min_ms:g} ms of each "
        "kernel, as a CUDA graph; µs and what follows from it are medians; x dense is how many "
        "times as fast as cuBLAS on the dense weight, paired by round, ± one standard error",
    ]


def _describe_cpu(result: KernelsResult) -> list[str]:
    machine, settings = result.environment, result.settings
    versions = _versions(result)
    cache = result.last_level_cache_bytes
    assert settings.cache_bytes is not None
    waiting = "spin while a graph runs" if settings.spin else "do not spin (allow_spinning 0)"
    return [
        f"machine: {machine.cpu}, {machine.cores} cores, {result.isa}; {versions}; {machine.date}",
        *(
            f"roof: {_plural(roof.threads, 'thread')} read {settings.roof_mib} MiB at "
            f"{roof.median:.1f} GB/s (before {roof.before.mean:.1f} ± {roof.before.stddev:.1f}, "
            f"after {roof.after.mean:.1f} ± {roof.after.stddev:.1f}, drift {roof.drift:.2f})"
            for roof in result.roofs
        ),
        f"weights: copies of each fill {settings.cache_bytes / _MIB:.0f} MiB and are taken in "
        f"turn; last-level cache "
        f"{'unknown' if cache is None else f'{cache / _MIB:.0f} MiB'}; seed {settings.seed}",
        f"rounds: {settings.rounds} in random order, at least {settings.min_ms:g} ms of each "
        "kernel; µs and what follows from it are medians; x NAME is how many times as fast as "
        "NAME, paired by round, ± one standard error; GFLOP/s as if nothing had been removed",
        "threads: ours, torch.set_num_threads and ONNX Runtime's intra_op_num_threads are equal; "
        f"ONNX Runtime's {waiting}",
    ]


def _remarks(
    kind: str,
    link: str,
    result: KernelsResult | GpuKernelsResult,
    why: Callable[[KernelRow], str | None],
) -> list[str]:
    """A line for each remark on a kernel and shape, with the value types that it holds for."""
    types: dict[tuple[str, str, str], dict[str, None]] = {}
    for group in result.groups:
        for row in group.kernels:
            if text := why(row):
                key = row.name, f"{group.rows}x{group.columns}", text
                types.setdefault(key, {})[group.values] = None
    return [
        f"{kind}: {shape} {name} ({', '.join(values)}) {link}{text}"
        for (name, shape, text), values in types.items()
    ]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def markdown(result: KernelsResult | GpuKernelsResult) -> str:
    """The result as Markdown: the facts, then a table for each group."""
    kernels = "GPU" if result.environment.device != "cpu" else "CPU"
    lines = [f"# {kernels} kernels compared", "", *(f"- {line}" for line in describe(result)), ""]
    for group in result.groups:
        compared = references(group)
        titles = ("kernel", *TITLES, *(f"x {name}" for name in compared))
        rows = [[row.name, *cells(row, compared)] for row in group.kernels]
        lines += [f"## {group.title}", "", *_table(titles, rows)]
    return "\n".join(lines)
