"""What ``secateur doctor`` says about and does for CUTLASS's sparse GEMMs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from secateur.cli import emit
from secateur.progress import progress


def cutlass_line(directory: Path | None = None) -> str:
    """Which libraries of CUTLASS kernels are there, and why others are not."""
    from secateur.compile.gpu.cutlass import ARCHITECTURES, library_path, open_library
    from secateur.errors import EnvironmentFault

    says = []
    for arch in ARCHITECTURES:
        try:
            library = open_library(arch, directory)
            use = "" if ARCHITECTURES[arch].packed else ", not used: weights are not packed for it"
            says.append(f"{arch}: {len(library.kernels)} kernels ({library.versions}){use}")
        except EnvironmentFault as fault:
            there = library_path(arch, directory).exists()
            says.append(f"{arch}: {fault.what}" if there else f"{arch}: not built")
    return "; ".join(says)


def prepare(
    build: bool, tune: bool, archs: str | None, directory: Path | None, as_json: bool
) -> None:
    """Build, or time, or both, and say what came of it."""
    done: dict[str, Any] = {}
    if build:
        done["libraries"] = _build(archs, directory)
    if tune:
        done["table"] = _tune(directory)
    if as_json:
        emit(done)
        return
    for library in done.get("libraries", []):
        state = "compiled" if library["compiled"] else "was up to date"
        print(f"{library['arch']}: {library['kernels']} kernels {state}: {library['library']}")
    if tune:
        print(f"table of tiles: {done['table']}")


def _build(archs: str | None, directory: Path | None) -> list[dict[str, Any]]:
    from secateur.compile.gpu.cutlass import ARCHITECTURES, build_library, kernels_of

    packed = [name for name, target in ARCHITECTURES.items() if target.packed]
    names = packed if archs is None else archs.replace(" ", "").split(",")
    for name in names:
        kernels_of(name)  # refuses an unknown one before any work is done
    facts = []
    for name in names:
        with progress(f"compiling for {name}") as tick:
            built = build_library(name, directory, progress=tick)
        for warning in built.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        facts.append(
            {
                "arch": name,
                "library": str(built.path),
                "kernels": built.kernels,
                "compiled": built.fresh,
                "warnings": list(built.warnings),
            }
        )
    return facts


def _tune(directory: Path | None) -> str:
    from secateur.compile.gpu.cutlass.tune import tune

    with progress("timing kernels") as tick:
        return str(tune(directory, progress=tick))
