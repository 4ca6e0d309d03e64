"""``secateur compile``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from secateur.cli import Json, app, emit
from secateur.errors import UsageError, did_you_mean, some

if TYPE_CHECKING:
    from secateur.compile import LayerReport, PackReport
    from secateur.recipe import Calibration


@app.command("compile")
def compile_(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Pruned model directory, or a sparse checkpoint of another program; any for "
            "--format dense and onnx.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")],
    format_: Annotated[
        str, typer.Option("--format", help="How to store it; see `secateur formats`.")
    ] = "packed",
    values: Annotated[
        str | None,
        typer.Option(
            help="fp32, bf16 or fp16: convert all weights; int8, int4 or fp8: quantise the linears "
            "of the blocks.  [default: the model's own]"
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="int8, int4: inputs that share a scale: 32, 64 or 128.  [default: 64]"),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="int8, int4, fp8: gptq, or rtn (round to nearest).  [default: gptq]"),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors: one for each row (channel) or one for all (tensor); "
            "marlin-24: for 128 inputs (group) or each row (channel)."
        ),
    ] = None,
    era: Annotated[
        str | None,
        typer.Option(help="Oldest compressed-tensors to read the result: 0.9 or 0.8."),
    ] = None,
    onnx_weights: Annotated[
        str | None,
        typer.Option(
            help="onnx: bitmask, sparse-initializer or dense.  [default: bitmask]",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration text of gptq, as of `secateur prune`.  [default: the text that "
            "pruning read, if it is at hand, else self]"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences.  [default: 32]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per sequence.  [default: 512]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides which text is drawn.  [default: 0]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of gptq: auto, cpu, cuda or cuda:N.  [default: auto]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: Json = False,
) -> None:
    """Store a pruned model in a smaller form: a bitmask and the weights that are left."""
    from secateur.compile import FORMATS

    if format_ not in FORMATS:
        raise UsageError(f"--format {format_!r} is not known", did_you_mean(format_, FORMATS))
    form = FORMATS[format_]
    special = {"group_size": group_size, "scales": scales, "era": era}
    special |= {"onnx_weights": onnx_weights}
    walk = {"quantize": quantize, "device": device}
    text = {"data": data, "samples": samples, "length": length, "seed": seed}
    special, walk, text = (_given(options) for options in (special, walk, text))
    options: dict[str, Any] = {"values": values, "overwrite": overwrite}
    given, taken = special | walk | text, form.options
    if values in form.walks:
        taken |= {*walk, *text}
    if values not in ("int8", "int4"):
        taken -= {"group_size"}
    if unused := [flag for flag in given if flag not in taken]:
        _refuse(unused[0].replace("_", "-"), format_, bool(form.walks))
    if values in form.walks:
        options |= walk | {"calibration": _calibration(model, text, quantize), "quiet": quiet}
    report = form.write(model, output, **options, **special)
    if json:
        emit(report.model_dump(mode="json"))
    else:
        _print(report)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(flag: str, format_: str, walks: bool) -> NoReturn:
    if walks and flag not in ("scales", "era", "onnx-weights"):
        raise UsageError(
            f"--{flag} is of use to --values int8 and int4"
            f"{' only' if flag == 'group-size' else ', and fp8 of --format packed, only'}",
            f"add --values int8 or int4, or drop --{flag}",
        )
    raise UsageError(f"--{flag} is of no use to --format {format_}", f"drop --{flag}")


def _calibration(model: Path, text: dict[str, Any], quantize: str | None) -> Calibration | None:
    """The text of the flags, or what stands in for it; None: rtn, which needs none."""
    from secateur.artifact import MANIFEST, Manifest
    from secateur.compile.calibrate import usual_text
    from secateur.recipe import Calibration, validate

    if quantize == "rtn" and text.get("data", "none") == "none":
        if others := [name for name in text if name != "data"]:
            raise UsageError(f"--{others[0]} is of no use to rtn without --data", "drop it")
        return None
    if text.get("data") == "none":
        raise UsageError(
            "gptq needs calibration text and --data is 'none'",
            "drop --data (the default needs no file), or use --quantize rtn without --data",
        )
    known = (model / MANIFEST).exists()
    recipe = Manifest.read(model).recipe if known else {}
    usual = {} if "data" in text else {"data": usual_text(recipe)}
    return validate(Calibration, usual | text, "calibration")


def _print(report: PackReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("linears")
    measured = any(layer.quantization_error is not None for layer in report.layers.values())
    sizes = ("packed", "ratio", "rounding", "inputs") if measured else ("dense", "packed", "ratio")
    for heading in ("count", "shape", "pattern", *sizes):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, tuple[int, int], str], list[LayerReport]] = {}
    for name, layer in report.layers.items():
        group = re.sub(r".*\.\d+\.", "", name)  # the name within its decoder block
        groups.setdefault((group, layer.shape, layer.pattern), []).append(layer)
    for (group, shape, pattern), layers in groups.items():
        dense = sum(layer.dense_bytes for layer in layers)
        packed = sum(layer.packed_bytes for layer in layers)
        row = [group, str(len(layers)), f"{shape[0]}x{shape[1]}", pattern]
        table.add_row(*row, *_cells(dense, packed, layers if measured else []))
    if report.layers:
        table.add_section()
        own = list(report.layers.values()) if measured else []
        cells = _cells(report.linears_dense_bytes, report.linears_packed_bytes, own)
        table.add_row("packed linears", str(len(report.layers)), "", "", *cells)
    cells = _cells(report.dense_bytes, report.packed_bytes, [])
    table.add_row("whole model", "", "", "", *(cells[1:] if measured else cells))
    console = Console()
    console.print(table)
    said = "not pruned" if report.quantize else "left dense"
    names_of: dict[str, list[str]] = {}
    for name, reason in report.kept_dense.items():
        names_of.setdefault(reason, []).append(name)
    for reason, names in names_of.items():
        line = f"{said}: {some(names)}: {reason}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if report.quantize:
        console.print(_quantised(report), markup=False, highlight=False, soft_wrap=True)
    values = f" as {report.values}" if report.values else ""
    console.print(
        f"{report.output}: {_megabytes(report.packed_bytes)} of weights{values}, from "
        f"{_megabytes(report.source_bytes)} in {report.seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _quantised(report: PackReport) -> str:
    text, line = report.calibration, f"quantised by {report.quantize}"
    if report.quantize == "kept":
        line = f"{'fp8 values' if report.values == 'fp8' else 'integers'} kept as they were"
    if report.group_size is not None:
        line += f", groups of {report.group_size}"
    elif report.values == "fp8":
        line += ", a scale for each row"
    if report.quantize == "kept":
        return line
    if text is None:
        return f"{line}; reads no text, so no errors were measured"
    return (
        f"{line}, on {report.calibration_tokens} tokens of {text.data!r}, seed {text.seed}\n"
        "rounding: |(W - Q)X|² / |WX|²; inputs: what rounding them to 8 bits adds, "
        "|Q(X - X8)| / |QX|"
    )


def _cells(dense: int, packed: int, layers: list[LayerReport]) -> tuple[str, ...]:
    """Sizes; where ``layers`` were measured, instead of the dense one their mean errors."""
    from statistics import fmean

    ratio = f"{packed / dense:.3f}"
    if not layers:
        return _megabytes(dense), _megabytes(packed), ratio
    rounding = fmean(layer.quantization_error or 0.0 for layer in layers)
    inputs = fmean(layer.activation_error or 0.0 for layer in layers)
    return _megabytes(packed), ratio, f"{rounding:.1e}", f"{100 * inputs:.2f} %"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
