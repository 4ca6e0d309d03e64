"""Timing the kernels on the GPU at hand, for the table of tiles.

The weights are made so that no packer is needed: of every group the first half is kept, so that all
metadata is equal, whatever its order. The first result of each kernel is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from secateur.compile.gpu.cutlass.kernels import TYPES, Kernel, kernels_of
from secateur.compile.gpu.cutlass.library import (
    Operands,
    SparseGemmLibrary,
    architecture_for,
    open_library,
)
from secateur.compile.gpu.cutlass.tiles import Timing, current_table, refreshed, table_path
from secateur.errors import EnvironmentFault
from secateur.progress import Tick, no_tick

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""Outputs and inputs of the linears of Llama-3.1-8B."""
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096)
_KEEP_FIRST = 0x44
"""Two nibbles 0b0100: of four, places 0 and 1 are kept; of two, the first."""
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "s8": torch.int8}
_DTYPES |= {"e4m3": torch.float8_e4m3fn}


def tune(
    directory: str | Path | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    progress: Tick = no_tick,
) -> Path:
    """Time all kernels on the current GPU and write its table of tiles.

    Args:
        directory: of the library and of the table; None: the cache.
        shapes: outputs and inputs of weights.
        tokens: numbers of tokens.
        progress: is told of each shape, type and number of tokens.

    Returns:
        The path of the table.

    Raises:
        EnvironmentFault: no GPU, no library for it, or a kernel that computes something else.
    """
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            f"torch {torch.__version__} sees no CUDA device, so there is nothing to time",
            "run this where the model will be served; until then the shipped table is used",
        )
    arch = architecture_for(torch.cuda.get_device_capability())
    if arch is None:
        name = torch.cuda.get_device_name()
        raise EnvironmentFault(f"no CUTLASS kernels run on {name}", "they need sm_80 or newer")
    library = open_library(arch, directory)
    built = {facts.name for facts in library.kernels}
    chosen = [kernel for kernel in kernels_of(arch) if kernel.name in built]
    work = [(kernel, m, n, k) for m, k in shapes for n in tokens for kernel in chosen]
    timings = list(_timed(library, work, progress))
    source = f"measured on {torch.cuda.get_device_name()}, {datetime.now(UTC):%Y-%m-%d}"
    path = table_path(arch, directory)
    table = refreshed(current_table(arch, directory), timings, f"{source}, {library.versions}")
    table.write(path)
    return path


def _timed(
    library: SparseGemmLibrary, work: Iterable[tuple[Kernel, int, int, int]], progress: Tick
) -> Iterator[Timing]:
    work = list(work)
    for done, (kernel, m, n, k) in enumerate(work):
        number = library.number(kernel.name)
        if library.kernels[number].accepts(m, n, k):
            yield Timing(kernel, m, n, k, _time(library, number, kernel, m, n, k))
        progress(done + 1, len(work))


def _time(library: SparseGemmLibrary, number: int, kernel: Kernel, m: int, n: int, k: int) -> float:
    """Seconds of one product: the median of 20, each after the L2 cache was overwritten."""
    types, facts = TYPES[kernel.types], library.kernels[number]
    inputs, output = _DTYPES[types.inputs], _DTYPES[types.output]
    values, b = (_small(shape, inputs) for shape in ((m, k // 2), (n, k)))
    meta = torch.full(
        (library.meta_bytes(number, m, k),), _KEEP_FIRST, dtype=torch.uint8, device="cuda"
    )
    d = torch.empty((n, m) if facts.d_column_major else (m, n), dtype=output, device="cuda")
    size = library.workspace_bytes(number, m, n, k)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    operands = Operands(
        *(m, n, k, values.data_ptr(), meta.data_ptr()),
        *(b.data_ptr(), k, d.data_ptr(), d.shape[1]),
    )

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        library.launch(number, operands, workspace.data_ptr(), size, stream)

    launch()
    _check(kernel, values, b, d if facts.d_column_major else d.T)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    seconds: list[float] = []
    for _ in range(20):
        flush.zero_()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        launch()
        end.record()
        end.synchronize()
        seconds.append(float(start.elapsed_time(end)) / 1e3)
    return sorted(seconds)[len(seconds) // 2]


def _small(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random whole numbers from -2 to 2, which every type holds."""
    return torch.randint(-2, 3, shape, device="cuda").to(dtype)


def _check(kernel: Kernel, values: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
    """Compare d [n, m] with the product of values [m, k / 2] and the inputs that they stand for."""
    kept = 1 if TYPES[kernel.types].inputs == "f32" else 2
    groups = b.float().view(b.shape[0], -1, 2 * kept)[:, :, :kept]
    wanted = groups.reshape(b.shape[0], -1) @ values.float().T
    if not torch.allclose(d.float(), wanted, rtol=2**-7, atol=0.5):
        raise EnvironmentFault(
            f"{kernel.name} is off by up to {float((d.float() - wanted).abs().max()):g}",
            "this is a bug: report it with the output of `secateur doctor`",
        )
