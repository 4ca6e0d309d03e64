"""``secateur inspect``, ``doctor`` and ``formats``: what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, app, emit


@app.command()
def inspect(
    directory: Annotated[
        Path, Argument(help="A model directory, of any program, or an ONNX file.")
    ],
    layers: Annotated[bool, Option("--layers", help="Show every layer, not kinds.")] = False,
    json: Json = False,
) -> None:
    """Show what is in a model directory or ONNX file: patterns, zeros and bytes of each layer."""
    facts = _inspect(directory)
    if json:
        emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("linear", "layers", "pattern", "zeros", "MB", "of dense", box=None)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, layer in facts["layers"].items():
        groups.setdefault(name if layers else name.rpartition(".")[2], []).append(layer)
    for group, members in groups.items():
        weights = sum(layer["shape"][0] * layer["shape"][1] for layer in members)
        zeros = sum(layer["zeros"] * layer["shape"][0] * layer["shape"][1] for layer in members)
        size = sum(layer["bytes"] for layer in members)
        dense = sum(layer["dense_bytes"] for layer in members)
        table.add_row(
            group,
            str(len(members)),
            ", ".join(sorted({layer["pattern"] for layer in members})),
            f"{100 * zeros / weights:.2f} %",
            f"{size / 1e6:.2f}",
            f"{size / dense:.3f}",
        )
    console = Console()
    console.print(table)
    grouped = f" in groups of {facts['group_size']}" if facts["group_size"] else ""
    grouped = " with a scale for each row" if facts["values"] == "fp8" else grouped
    values = f", values {facts['values']}{grouped}" if facts["values"] else ""
    console.print(
        f"{facts['kind']} {facts['architecture']}{values}, {facts['bytes'] / 1e6:.1f} MB of "
        f"weights in {facts['files']} files",
        soft_wrap=True,
    )
    if facts["form"]:
        console.print(f"it holds {facts['form']}", markup=False, soft_wrap=True)
        console.print(f"to run it: {facts['rescue']}", markup=False, soft_wrap=True)
    for note in facts["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _inspect(directory: Path) -> dict[str, Any]:
    from secateur.artifact import MANIFEST, Manifest
    from secateur.checkpoint import Checkpoint
    from secateur.orphans import recognise, rescue

    if directory.suffix == ".onnx" or (directory / "model.onnx").is_file():
        return _onnx(directory)
    checkpoint = Checkpoint(directory)
    form = recognise(checkpoint)
    known = Manifest.read(directory) if (directory / MANIFEST).exists() else None
    layers = {}
    if known is None or not known.layers:
        layers = _measured(directory)
    else:
        for name, layer in known.layers.items():
            layers[name] = {
                "shape": list(layer.shape),
                "pattern": layer.pattern,
                "zeros": layer.sparsity,
                "bytes": layer.bytes,
                "dense_bytes": layer.dense_bytes,
                "relative_error": layer.relative_error,
                "kept_dense": layer.kept_dense,
                "quantize": layer.steps.get("quantize"),
            }
    packed = checkpoint.config.get("quantization_config", {})
    return {
        "directory": str(directory),
        "kind": "orphan" if form else known.kind if known else "dense",
        "form": form,
        "rescue": rescue(directory) if form else None,
        "architecture": checkpoint.config.get("model_type", "unknown"),
        "files": len(checkpoint.files),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "values": packed.get("values"),
        "group_size": packed.get("group_size"),
        "layers": layers,
        "notes": known.notes if known else [],
        "source": known.source if known else None,
        "recipe": known.recipe if known else None,
    }


def _onnx(path: Path) -> dict[str, Any]:
    """The facts of an ONNX file, all read from the file itself."""
    from secateur.compile.onnx.read import survey

    graph = path if path.suffix == ".onnx" else path / "model.onnx"
    found = survey(graph)
    return {
        "directory": str(path),
        "kind": "onnx",
        "form": None,
        "rescue": None,
        "architecture": f"opset {found.opset} by {found.producer}",
        "files": len(found.files),
        "bytes": sum(file.stat().st_size for file in found.files),
        "values": None,
        "group_size": None,
        "layers": found.layers,
        "notes": [],
        "source": None,
        "recipe": None,
    }


def _measured(directory: Path) -> dict[str, dict[str, Any]]:
    """Find the pattern of every linear in the blocks of a directory without a manifest."""
    import torch

    from secateur.compile.orphan import OrphanCheckpoint
    from secateur.compile.values import dtype_of
    from secateur.compile.zeros import pattern_of
    from secateur.model import StreamedModel

    checkpoint = OrphanCheckpoint(directory)
    dtype = dtype_of(checkpoint.config)
    model = StreamedModel(checkpoint, torch.device("cpu"), None)
    layers = {}
    for block in range(len(model.blocks)):
        for name, linear in model.linears(block).items():
            weight = checkpoint.load(f"{name}.weight")
            size = checkpoint.nbytes(f"{name}.weight")
            width = dtype.itemsize if checkpoint.decoded(f"{name}.weight") else 0
            layers[name] = {
                "shape": list(linear.shape),
                "pattern": str(pattern_of(weight.t() if linear.transposed else weight)),
                "zeros": float((weight == 0).float().mean()),
                "bytes": size,
                "dense_bytes": weight.numel() * (width or weight.element_size()),
            }
    return layers


@app.command()
def formats(json: Json = False) -> None:
    """List the formats that `secateur compile` writes."""
    from secateur.compile import FORMATS

    if json:
        emit([{"name": name, "summary": form.description} for name, form in FORMATS.items()])
        return
    for name, form in FORMATS.items():
        print(f"{name:18} {form.description}")


@app.command()
def doctor(
    build_cutlass: Annotated[
        bool,
        Option("--build-cutlass", help="Compile CUTLASS's sparse GEMMs with nvcc, no GPU needed."),
    ] = False,
    tune_cutlass: Annotated[
        bool,
        Option("--tune-cutlass", help="Time them on the GPU at hand; decides which runs when."),
    ] = False,
    arch: Annotated[
        str | None,
        Option(help="What to compile for: sm_80, sm_90a, with commas.", show_default="both"),
    ] = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="Where the libraries are.", show_default="the cache"),
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine can do: libraries, CPU, GPU, kernels, each with its reason."""
    from secateur.cli import cutlass_command

    if build_cutlass or tune_cutlass:
        cutlass_command.prepare(build_cutlass, tune_cutlass, arch, output, json)
        return
    facts = _diagnosis() | {"cutlass": cutlass_command.cutlass_line(output)}
    if json:
        emit(facts)
        return
    for name, says in facts.items():
        print(f"{name:14} {says}")


def _diagnosis() -> dict[str, str]:
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    import torch

    import secateur
    from secateur.device import choose_dtype, cpu_name

    def installed(name: str, extra: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return f"not installed: {extra}"

    try:
        from secateur.compile._kernels import cpu_features, isa

        offered = ", ".join(cpu_features()) or "no SIMD"
        kernels = f"native module built, {isa()} in use; this CPU offers {offered}"
    except ImportError as fault:
        kernels = f"no native module ({fault}): install again with a C++17 compiler present"
    from secateur.compile import torch_ops
    from secateur.compile.gpu import machine
    from secateur.compile.onnx.environment import providers

    called = "C++"
    if torch_ops.OBSTACLE is not None:
        way = "in Python, some 12 us more for each product" if torch_ops.BUILT else "none"
        called = f"{way}: {torch_ops.OBSTACLE}"
    pruner = "native module built"
    if find_spec("secateur.prune._native") is None:
        pruner = "no native module: +swaps and sparsegpt run in torch, many times slower on a CPU"
    gpu = f"none: torch {torch.__version__} sees no CUDA device"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    dtype, reason = choose_dtype("auto", torch.device("cpu"))
    facts = {
        "secateur": secateur.__version__,
        "python": platform.python_version(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "cpu compute": f"{dtype} ({reason})",
        "kernels": kernels,
        "torch op": called,
        "pruning": pruner,
        "gpu": gpu,
        **machine.diagnosis(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "onnx": providers(),
        "datasets": installed("datasets", "data sets from the hub need `secateur[data]`"),
    }
    if find_spec("vllm") is not None:
        facts["vllm"] = "installed; secateur has no plug-in for it yet"
    return facts
