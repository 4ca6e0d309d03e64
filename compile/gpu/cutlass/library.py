"""A compiled library of sparse GEMMs, through ctypes; sparse_gemm.h is its specification.

    gemm = open_library("sm_90a")
    number = gemm.number("sm_90a-bf16-128x128x128")
    gemm.launch(number, Operands(...), stream=torch.cuda.current_stream().cuda_stream)

Loading it and everything but `SparseGemmLibrary.launch` need neither a GPU nor a driver.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from secateur.compile.gpu.cutlass.kernels import ARCHITECTURES, Kernel
from secateur.errors import EnvironmentFault, UsageError, did_you_mean
from secateur.source import cache_directory

ABI = 1
BUILD = "build it with `secateur doctor --build-cutlass`"


class _Facts(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("operation", c_char_p),
        *(
            (name, c_int32)
            for name in (
                *("tile_m", "tile_n", "tile_k", "stages", "threads", "shared_bytes"),
                *("multiple_m", "multiple_n", "multiple_k", "multiple_b", "multiple_d"),
                *("d_column_major", "meta_tile_k"),
            )
        ),
    )


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What a kernel says of itself.

    Attributes:
        name: as `kernels.Kernel.name`.
        operation: CUTLASS's name of the GEMM.
        tile: M, N and K of a block's tile.
        stages: tiles in flight.
        threads, shared_bytes: of a block.
        multiples: what m, n and k must be multiples of.
        multiple_b, multiple_d: what the leading dimensions must be multiples of.
        d_column_major: D is ``[n, m]`` row-major (a row for each token); else ``[m, n]``.
        meta_tile_k: of the SM90 order of metadata; 0: the SM80 order; -1: that of SM100, in which
            secateur packs nothing yet.
    """

    name: str
    operation: str
    tile: tuple[int, int, int]
    stages: int
    threads: int
    shared_bytes: int
    multiples: tuple[int, int, int]
    multiple_b: int
    multiple_d: int
    d_column_major: bool
    meta_tile_k: int

    def accepts(self, m: int, n: int, k: int) -> bool:
        """Whether the kernel can compute a product of these extents."""
        extents = (m, n, k)
        return all(e > 0 and e % by == 0 for e, by in zip(extents, self.multiples, strict=True))


@dataclass(frozen=True, slots=True)
class Operands:
    """A product D = alpha * row_scale * column_scale * (A B) + bias, by device addresses.

    Attributes:
        m, n, k: outputs, tokens, inputs (before pruning).
        values: A's kept values, row-major ``[m, k / 2]``.
        meta: A's metadata in the kernel's order, `SparseGemmLibrary.meta_bytes` long.
        b: activations, row-major ``[n, k]``, ``ldb`` elements from token to token.
        d: result, ``[n, m]`` if the kernel is ``d_column_major``, else ``[m, n]``; ``ldd`` elements
            from row to row.
        row_scale: fp32 ``[m]``, or None for 1.
        column_scale: fp32 ``[n]``, or None for 1.
        bias: ``[m]`` of D's type, or None for 0.
        alpha: a factor.
    """

    m: int
    n: int
    k: int
    values: int
    meta: int
    b: int
    ldb: int
    d: int
    ldd: int
    row_scale: int | None = None
    column_scale: int | None = None
    bias: int | None = None
    alpha: float = 1.0


class SparseGemmLibrary:
    """A loaded library.

    Args:
        path: of the shared library.

    Raises:
        EnvironmentFault: it cannot be loaded, or has another version of the interface.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as fault:
            raise EnvironmentFault(f"{path} holds no sparse GEMMs: {fault}", BUILD) from fault
        if (abi := self._library.secateur_abi()) != ABI:
            raise EnvironmentFault(
                f"{path} has version {abi} of the interface, and this secateur needs {ABI}", BUILD
            )
        self.build_key = self._library.secateur_build_key().decode()
        self.versions = self._library.secateur_build_versions().decode()
        self.kernels = [self._facts(n) for n in range(self._library.secateur_kernel_count())]

    def _facts(self, number: int) -> KernelFacts:
        raw = _Facts()
        self._library.secateur_kernel(number, ctypes.byref(raw))
        return KernelFacts(
            name=raw.name.decode(),
            operation=raw.operation.decode(),
            tile=(raw.tile_m, raw.tile_n, raw.tile_k),
            stages=raw.stages,
            threads=raw.threads,
            shared_bytes=raw.shared_bytes,
            multiples=(raw.multiple_m, raw.multiple_n, raw.multiple_k),
            multiple_b=raw.multiple_b,
            multiple_d=raw.multiple_d,
            d_column_major=bool(raw.d_column_major),
            meta_tile_k=raw.meta_tile_k,
        )

    def number(self, name: str) -> int:
        """The number of the kernel of this name.

        Raises:
            UsageError: the library has none.
        """
        names = [kernel.name for kernel in self.kernels]
        if name not in names:
            raise UsageError(f"{self.path} has no kernel {name!r}", did_you_mean(name, names))
        return names.index(name)

    def usable(
        self, types: str, m: int, n: int, k: int, shared_limit: int | None = None
    ) -> list[Kernel]:
        """The kernels of these types that can compute a product of these extents.

        Args:
            types: a key of `kernels.TYPES`.
            m, n, k: outputs, tokens and inputs.
            shared_limit: bytes of shared memory that a block may have on the GPU (torch:
                ``get_device_properties().shared_memory_per_block_optin``); None: enough.
        """
        fitting = [
            Kernel.parse(facts.name)
            for facts in self.kernels
            if facts.accepts(m, n, k) and facts.shared_bytes <= (shared_limit or facts.shared_bytes)
        ]
        return [kernel for kernel in fitting if kernel.types == types]

    def meta_bytes(self, kernel: int, m: int, k: int) -> int:
        """Bytes of metadata of a weight ``[m, k]``; -1 if there is no such kernel."""
        return int(self._library.secateur_meta_bytes(kernel, m, k))

    def workspace_bytes(self, kernel: int, m: int, n: int, k: int) -> int:
        """Bytes of device memory that a launch needs; -1 if there is no such kernel."""
        return int(self._library.secateur_workspace_bytes(kernel, m, n, k))

    def launch(
        self,
        kernel: int,
        operands: Operands,
        workspace: int | None = None,
        workspace_bytes: int = 0,
        stream: int | None = None,
    ) -> None:
        """Start a product on a stream; it has not ended when this returns.

        Args:
            kernel: number of the kernel.
            operands: addresses and extents.
            workspace, workspace_bytes: device memory of at least `workspace_bytes`.
            stream: address of a ``cudaStream_t``; None: the default stream.

        Raises:
            EnvironmentFault: what the status says, e.g. that there is no GPU.
        """
        status = self.try_launch(kernel, operands, workspace, workspace_bytes, stream)
        if status:
            name = self.kernels[kernel].name if 0 <= kernel < len(self.kernels) else str(kernel)
            raise EnvironmentFault(
                f"sparse GEMM {name} of m {operands.m}, n {operands.n}, k {operands.k}: "
                f"{self.message(status)} (status {status})",
                "see docs/gpu.md for what the kernels need",
            )

    def try_launch(
        self,
        kernel: int,
        operands: Operands,
        workspace: int | None = None,
        workspace_bytes: int = 0,
        stream: int | None = None,
    ) -> int:
        """As `launch`, but gives the status: 0 if the product was started."""
        o = operands
        return int(
            self._library.secateur_sparse_gemm(
                *(kernel, o.m, o.n, o.k, o.values, o.meta, o.b, o.ldb, o.d, o.ldd),
                *(o.row_scale, o.column_scale, o.bias, o.alpha),
                *(workspace, workspace_bytes, stream),
            )
        )

    def message(self, status: int) -> str:
        """A status in words."""
        return str(self._library.secateur_message(status).decode())


_SIGNATURES = {
    "secateur_abi": (c_int32, ()),
    "secateur_build_key": (c_char_p, ()),
    "secateur_build_versions": (c_char_p, ()),
    "secateur_kernel_count": (c_int32, ()),
    "secateur_kernel": (c_int32, (c_int32, ctypes.POINTER(_Facts))),
    "secateur_meta_bytes": (c_int64, (c_int32,) * 3),
    "secateur_workspace_bytes": (c_int64, (c_int32,) * 4),
    "secateur_sparse_gemm": (
        c_int32,
        (
            *(c_int32,) * 4,
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_float),
            *(c_void_p, c_int64, c_void_p),
        ),
    ),
    "secateur_message": (c_char_p, (c_int32,)),
}


def library_path(arch: str, directory: str | Path | None = None) -> Path:
    """Where the library of an architecture is, or would be.

    Args:
        arch: a key of `kernels.ARCHITECTURES`.
        directory: None: ``cutlass`` in ``$SECATEUR_CACHE`` or else in ``~/.cache/secateur``.
    """
    home = Path(directory) if directory is not None else cache_directory() / "cutlass"
    return home / f"sparse_gemm_{arch}.so"


def open_library(arch: str, directory: str | Path | None = None) -> SparseGemmLibrary:
    """The library of an architecture, loaded once in a process.

    Raises:
        EnvironmentFault: it was not built, or does not load.
    """
    path = library_path(arch, directory)
    if not path.exists():
        raise EnvironmentFault(f"there are no compiled CUTLASS kernels at {path}", BUILD)
    return _load(path)


@cache
def _load(path: Path) -> SparseGemmLibrary:
    return SparseGemmLibrary(path)


def architecture_for(capability: tuple[int, int]) -> str | None:
    """The architecture whose kernels run on a GPU of this compute capability; None: there is none.

    The newest that weights can be packed for; code of an "a" architecture runs on that GPU alone.
    """
    number = 10 * capability[0] + capability[1]
    fitting = {
        target.capability: arch
        for arch, target in ARCHITECTURES.items()
        if target.packed
        and (number == target.capability if target.exact else number >= target.capability)
    }
    return fitting[max(fitting)] if fitting else None
