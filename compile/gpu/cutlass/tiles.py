"""Which kernel computes a product: a table by shape, and the model that the first one came from.

A row of the table holds for products of up to so many outputs m, tokens n and inputs k; the first
row that fits counts. ``tiles.json`` beside this file holds what was measured on an H100
(docs/gpu/h100-cutlass.json) before the rows of `modelled`; a run on another GPU puts its own rows
before those (`refreshed`). On the H100 the model's tile was the fastest of four for 56 of 64
products in bf16 and fp8, and at most 21 % slower.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass, fields
from math import ceil, inf
from pathlib import Path

from secateur.checkpoint import read_json, sync_file
from secateur.compile.gpu.cutlass.kernels import ARCHITECTURES, TYPES, Kernel, kernels_of
from secateur.compile.gpu.cutlass.library import library_path
from secateur.errors import ModelError, UsageError

SHIPPED = Path(__file__).with_name("tiles.json")
ROWS = (1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Device:
    """Published numbers of the GPU that the model has in mind for an architecture.

    Attributes:
        name: of the GPU.
        processors: its SMs.
        flops: dense 16-bit tensor-core operations in a second; twice as many when sparse.
        bandwidth: bytes in a second from memory.
        l2_bandwidth: the same from the L2 cache.
    """

    name: str
    processors: int
    flops: float
    bandwidth: float
    l2_bandwidth: float


# NVIDIA's data sheets; L2: Chips and Cheese, "Nvidia's H100" (2023), measured reads; of the B200,
# of which we know none, that of the H100 by the number of processors.
DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 108, 312e12, 2.04e12, 4.6e12),
    "sm_90a": Device("H100 SXM", 132, 989e12, 3.35e12, 5.6e12),
    "sm_100a": Device("B200", 148, 2.25e15, 8e12, 6.3e12),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table; an extent of None: any.

    Attributes:
        arch, types: as of `Kernel`.
        m, n, k: the largest extents that it holds for.
        kernel: name of the kernel.
    """

    arch: str
    types: str
    m: int | None
    n: int | None
    k: int | None
    kernel: str

    def holds(self, arch: str, types: str, m: int, n: int, k: int) -> bool:
        """Whether the row is about products like this."""
        extents = zip((m, n, k), (self.m, self.n, self.k), strict=True)
        within = all(limit is None or extent <= limit for extent, limit in extents)
        return within and (self.arch, self.types) == (arch, types)


@dataclass(frozen=True, slots=True)
class TileTable:
    """Rows in the order in which they are tried, and where they come from."""

    source: str
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path = SHIPPED) -> TileTable:
        """Read a table.

        Raises:
            ModelError: the file is missing, or is no table.
        """
        content = read_json(path)
        try:
            return cls(content["source"], tuple(Row(*row) for row in content["rows"]))
        except (KeyError, TypeError) as fault:
            raise ModelError(
                f"{path} is no table of tiles: {fault}",
                "delete it, or write it again with `secateur doctor --tune-cutlass`",
            ) from fault

    def write(self, path: Path) -> None:
        """Write the table as JSON, a row to a line, whole or not at all."""
        columns = json.dumps([field.name for field in fields(Row)])
        rows = ",\n".join(json.dumps(astuple(row)) for row in self.rows)
        head = f'"source": {json.dumps(self.source)},\n"columns": {columns}'
        aside = path.with_name(path.name + ".writing")
        aside.write_text(f'{{{head},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")
        sync_file(aside)
        os.replace(aside, path)


def table_path(arch: str, directory: str | Path | None = None) -> Path:
    """Where the tuned table of an architecture is, or would be: beside its library."""
    return library_path(arch, directory).with_name(f"tiles_{arch}.json")


def current_table(arch: str, directory: str | Path | None = None) -> TileTable:
    """The tuned table if there is one, else the shipped one."""
    path = table_path(arch, directory)
    return TileTable.read(path) if path.exists() else TileTable.read()


def choose(table: TileTable, usable: Collection[Kernel], m: int, n: int, k: int) -> Kernel:
    """The kernel for a product: the table's if usable, else the usable one the model likes.

    Args:
        table: any.
        usable: kernels of one architecture and types: built, fitting the GPU and the extents.
        m, n, k: outputs, tokens and inputs.

    Raises:
        UsageError: no kernel is usable.
    """
    if not usable:
        raise UsageError(
            f"no CUTLASS kernel can compute m {m}, n {n}, k {k}",
            "docs/gpu.md says what they need; `secateur doctor --build-cutlass` builds all",
        )
    named = {kernel.name: kernel for kernel in usable}
    first = next(iter(usable))
    for row in table.rows:
        if row.holds(first.arch, first.types, m, n, k) and row.kernel in named:
            return named[row.kernel]
    return min(usable, key=lambda kernel: (predicted_seconds(kernel, m, n, k), kernel.tile))


def predicted_seconds(kernel: Kernel, m: int, n: int, k: int) -> float:
    """How long a product takes at least, by the model.

    Blocks of one tile run in waves of one block to a processor, the last wave as long as the
    others. A block takes the longer of its multiplications at the sparse peak and of its operands
    from the L2 cache. All together take no less than memory takes for the operands, read once.

    Args:
        kernel: which tile.
        m, n, k: outputs, tokens and inputs.
    """
    device = DEVICES[kernel.arch]
    size = TYPES[kernel.types].bits / 8
    weight = size / 2 + (0.25 if size == 4 else 0.125)
    tile_m, tile_n, _ = kernel.tile
    waves = ceil(ceil(m / tile_m) * ceil(n / tile_n) / device.processors)
    peak = 2 * device.flops * 2 / size
    multiply = 2 * tile_m * tile_n * k / (peak / device.processors)
    load = (
        (min(tile_m, m) * weight + min(tile_n, n) * size)
        * k
        / (device.l2_bandwidth / device.processors)
    )
    memory = (m * k * weight + n * k * size) / device.bandwidth
    return max(waves * max(multiply, load), memory)


def modelled() -> TileTable:
    """The table of the model, for all architectures; ``k`` scales all kernels alike."""
    rows: list[Row] = []
    for arch, target in ARCHITECTURES.items():
        for types in target.types:
            usable = [kernel for kernel in kernels_of(arch) if kernel.types == types]
            for m in ROWS:
                rows += _for_rows(usable, m)
    names = ", ".join(f"{arch}: {device.name}" for arch, device in DEVICES.items())
    return TileTable(f"model ({names})", tuple(rows))


def _for_rows(usable: list[Kernel], m: int) -> Iterable[Row]:
    """The rows of products with up to ``m`` outputs, one for each run of equal kernels."""
    nothing = TileTable("", ())
    best = [(n, choose(nothing, usable, m, n, 4096)) for n in TOKENS]
    limit_m = None if m == ROWS[-1] else m
    for here, after in zip(best, [*best[1:], None], strict=True):
        if after is None or after[1] != here[1]:
            limit_n = None if after is None else here[0]
            kernel = here[1]
            yield Row(kernel.arch, kernel.types, limit_m, limit_n, None, kernel.name)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a kernel took for a product."""

    kernel: Kernel
    m: int
    n: int
    k: int
    seconds: float


def refreshed(table: TileTable, timings: Iterable[Timing], source: str) -> TileTable:
    """A table with the fastest kernel of every measured shape before the rows of the old one.

    Rows of the old table that the new ones repeat are dropped.

    Args:
        table: the old one.
        timings: of any kernels; those of one shape are compared with each other.
        source: device, date and versions.
    """
    best: dict[tuple[str, str, int, int, int], Timing] = {}
    for timing in timings:
        kernel = timing.kernel
        shape = (kernel.arch, kernel.types, timing.m, timing.n, timing.k)
        if timing.seconds < (best[shape].seconds if shape in best else inf):
            best[shape] = timing
    rows = [Row(*shape, best[shape].kernel.name) for shape in sorted(best)]
    measured = {(row.arch, row.types, row.m, row.n, row.k) for row in rows}
    old = [r for r in table.rows if (r.arch, r.types, r.m, r.n, r.k) not in measured]
    return TileTable(f"{source}; else {table.source}", (*rows, *old))
