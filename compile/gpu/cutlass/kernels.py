"""Which sparse GEMMs are built: an architecture, types and a tile each.

cutlass_library's generator enumerates what CUTLASS has (`operations`); of it one GEMM is taken for
each `Kernel` here. All kernels of one architecture and type read the same packed weight: on SM90
the order of the metadata depends on the tile's K, so that one is fixed by type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from secateur.errors import EnvironmentFault, UsageError, did_you_mean

INSTALL = "pip install --no-deps nvidia-cutlass==4.2.0.0"


@dataclass(frozen=True, slots=True)
class Types:
    """Element types of a GEMM, by CUTLASS's names.

    Attributes:
        inputs: of A's values and of B.
        sums: of the accumulator.
        output: of D and of the bias.
        bits: of one input.
    """

    inputs: str
    sums: str
    output: str
    bits: int


TYPES = {
    "bf16": Types("bf16", "f32", "bf16", 16),
    "fp16": Types("f16", "f32", "f16", 16),
    "tf32": Types("f32", "f32", "f32", 32),
    "int8-bf16": Types("s8", "s32", "bf16", 8),
    "int8-fp16": Types("s8", "s32", "f16", 8),
    "fp8-bf16": Types("e4m3", "f32", "bf16", 8),
    "fp8-fp16": Types("e4m3", "f32", "f16", 8),
}
"""By name: the type of the values, and behind the hyphen that of D where it is another. The values
of tf32 are fp32, kept 1 of 2 and rounded to tf32 by the tensor cores."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A GPU architecture to compile for.

    Attributes:
        codes: nvcc's ``-gencode`` argument.
        types: those that CUTLASS's generator has sparse GEMMs of there.
        tile_k: K of the tile by bits of an input.
        tiles: M and N of the tiles.
        capability: 10 * major + minor of the GPU it is for.
        exact: whether its code runs on that GPU alone.
        packed: whether secateur can put metadata into the order that its kernels read.
        nvcc: the oldest that compiles for it.
    """

    codes: str
    types: tuple[str, ...]
    tile_k: dict[int, int]
    tiles: tuple[tuple[int, int], ...]
    capability: int
    exact: bool
    packed: bool = True
    nvcc: tuple[int, int] = (12, 4)


_TILES_80 = ((64, 64), (128, 64), (128, 128), (256, 128))
_TILES_90 = ((64, 16), (64, 64), (128, 128), (256, 128))
_TYPES_90 = ("bf16", "fp16", "int8-bf16", "int8-fp16", "fp8-bf16", "fp8-fp16")
ARCHITECTURES = {
    "sm_80": Architecture(
        "arch=compute_80,code=[sm_80,compute_80]",
        ("bf16", "fp16", "tf32", "int8-bf16", "int8-fp16"),
        {8: 128, 16: 64, 32: 32},
        _TILES_80,
        80,
        False,
    ),
    "sm_90a": Architecture(
        "arch=compute_90a,code=sm_90a", _TYPES_90, {8: 128, 16: 128}, _TILES_90, 90, True
    ),
    "sm_100a": Architecture(
        "arch=compute_100a,code=sm_100a",
        ("bf16", "fp16", "fp8-bf16", "fp8-fp16"),
        {8: 128, 16: 64},
        ((128, 128), (128, 256)),
        100,
        True,
        packed=False,
        nvcc=(12, 8),
    ),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One sparse GEMM.

    Attributes:
        arch: a key of `ARCHITECTURES`.
        types: a key of `TYPES`.
        tile: M, N and K of what a block of threads computes at once, in weights before pruning.
    """

    arch: str
    types: str
    tile: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Unique, and the same in every build: ``sm_80-bf16-128x64x64``."""
        return f"{self.arch}-{self.types}-{'x'.join(map(str, self.tile))}"

    @classmethod
    def parse(cls, name: str) -> Kernel:
        """The kernel of this `name`."""
        arch, _, rest = name.partition("-")
        types, _, tile = rest.rpartition("-")
        m, n, k = map(int, tile.split("x"))
        return cls(arch, types, (m, n, k))


def kernels_of(arch: str) -> list[Kernel]:
    """All kernels of an architecture.

    Raises:
        UsageError: the architecture is not known.
    """
    if arch not in ARCHITECTURES:
        known = did_you_mean(arch, ARCHITECTURES)
        raise UsageError(f"there are no sparse GEMMs for architecture {arch!r}", known)
    target = ARCHITECTURES[arch]
    return [
        Kernel(arch, types, (m, n, target.tile_k[TYPES[types].bits]))
        for types in target.types
        for m, n in target.tiles
    ]


def cutlass_path() -> Path:
    """CUTLASS's sources: the directory that holds ``include`` and ``tools``.

    Raises:
        EnvironmentFault: nvidia-cutlass is not installed.
    """
    return Path(_library().__path__[0]) / "source"


def cutlass_version() -> str:
    """The version of the installed nvidia-cutlass.

    Raises:
        EnvironmentFault: it is not installed.
    """
    from importlib.metadata import version

    _library()
    return version("nvidia-cutlass")


def _library() -> Any:
    try:
        import cutlass_library
    except ImportError as fault:
        raise EnvironmentFault(f"CUTLASS is not installed ({fault})", INSTALL) from fault
    return cutlass_library


def operation(kernel: Kernel) -> Any:
    """CUTLASS's description of a kernel: a ``cutlass_library.gemm_operation.GemmOperation``.

    Its output is set to that of the kernel's types; the rest is as CUTLASS enumerates it.

    Raises:
        EnvironmentFault: nvidia-cutlass is not installed, or this version has no such GEMM.
    """
    from copy import deepcopy

    library = _library().library
    wanted = TYPES[kernel.types]
    for candidate in operations(kernel.arch, kernel.types):
        if _tile(candidate) == kernel.tile:
            found = deepcopy(candidate)
            found.D = deepcopy(found.D)
            found.D.element = library.DataType[wanted.output]
            vars(found).pop("_procedural_name", None)  # a cache; it names the output
            if kernel.arch == "sm_80":
                found.C.element = found.D.element
            if kernel.arch == "sm_100a":
                _settle_sm100(found, library.DataType[wanted.inputs])
            return found
    raise EnvironmentFault(
        f"nvidia-cutlass {cutlass_version()} has no sparse GEMM like {kernel.name}", INSTALL
    )


def _settle_sm100(found: Any, inputs: Any) -> None:
    """Give an SM100 GEMM, which is enumerated for a width of inputs, a type, and D by tokens.

    Its cluster, left open until it is launched, becomes one block.
    """
    from cutlass_library.library import LayoutType

    found.A.element = found.B.element = inputs
    instruction = found.tile_description.math_instruction
    instruction.element_a = instruction.element_b = inputs
    found.C.layout = found.D.layout = LayoutType.ColumnMajor
    found.tile_description.cluster_shape = [1, 1, 1]


def _tile(candidate: Any) -> tuple[int, ...]:
    description = candidate.tile_description
    if candidate.gemm_kind.name == "Sparse":  # CUTLASS 2
        return tuple(description.threadblock_shape)
    return tuple(candidate.get_collective_tile_shape())


@cache
def operations(arch: str, types: str) -> list[Any]:
    """CUTLASS's sparse GEMMs of a weight [m, k] row-major and activations [k, n] column-major.

    Of SM90 those with D column-major, no source C and the TMA epilogue, two blocks to a cluster
    along M, so that they share activations; with the ping-pong schedule, and the cooperative one
    for tiles too large for one group of warps. The sums of fp8 stay in the
    tensor cores (fast accumulation), as in vLLM and torchao.

    Args:
        arch: a key of `ARCHITECTURES`.
        types: a key of `TYPES`.
    """
    wanted = TYPES[types]
    inputs = wanted.inputs
    if arch == "sm_100a":  # enumerated for a width: see `_settle_sm100`
        inputs = "f8" if wanted.bits == 8 else "f16"
    sparse = [
        found
        for found in _enumerate(arch, _GENERATORS[arch, wanted.inputs])
        if found.A.element.name == found.B.element.name == inputs
        and found.accumulator_type().name == wanted.sums
        and (found.A.layout.name, found.B.layout.name) == ("RowMajor", "ColumnMajor")
    ]
    if arch == "sm_80":
        return sparse
    if arch == "sm_100a":
        return [found for found in sparse if _preferred_sm100(found)]
    return [found for found in sparse if _preferred(found, fp8=wanted.inputs == "e4m3")]


def _preferred(found: Any, fp8: bool) -> bool:
    """Whether an SM90 GEMM is the one to take of those that differ in more than tile and types."""
    m, n = _tile(found)[:2]
    schedule = "Cooperative" if m * n > 128 * 128 else "Pingpong"
    fast = "FP8FastAccum" if fp8 else ""
    return bool(
        found.D.layout.name == "ColumnMajor"
        and found.C.element.name == "void"
        and tuple(found.tile_description.cluster_shape) == (2, 1, 1)
        and found.tile_scheduler.name == "Default"
        and found.epilogue_schedule.name.startswith("TmaWarpSpecialized")
        and found.kernel_schedule.name == f"TmaWarpSpecialized{schedule}{fast}"
    )


def _preferred_sm100(found: Any) -> bool:
    """The same of an SM100 GEMM: those that one SM computes, of no set cluster."""
    return bool(
        found.C.element.name == "void"
        and tuple(found.tile_description.cluster_shape) == (0, 0, 1)
        and found.tile_scheduler.name == "Default"
        and found.kernel_schedule.name == "SparseTmaWarpSpecialized1SmSm100"
    )


_LEVEL = "142"
"""cutlass_library's instantiation level: small N and both K of the tiles, clusters of two."""


_GENERATORS = {
    ("sm_80", "s8"): "SM80_SparseTensorOp_16864_TN",
    ("sm_80", "f32"): "SM80_SparseTensorOp_16816_fast_math",
    ("sm_80", "f16"): "SM80_SparseTensorOp_16832",
    ("sm_80", "bf16"): "SM80_SparseTensorOp_16832",
    ("sm_90a", "s8"): "SM90_SparseTensorOp_int8_WGMMA_gemm",
    ("sm_90a", "e4m3"): "SM90_SparseTensorOp_fp8_WGMMA_gemm",
    ("sm_90a", "f16"): "SM90_SparseTensorOp_16b_WGMMA_gemm",
    ("sm_90a", "bf16"): "SM90_SparseTensorOp_16b_WGMMA_gemm",
    ("sm_100a", "e4m3"): "SM100_SparseTensorOp_fp8_UMMA_gemm",
    ("sm_100a", "f16"): "SM100_SparseTensorOp_16b_UMMA_gemm",
    ("sm_100a", "bf16"): "SM100_SparseTensorOp_16b_UMMA_gemm",
}
"""What cutlass_library's generator calls the enumeration of the sparse GEMMs of these inputs."""


@cache
def _enumerate(arch: str, enumeration: str) -> list[Any]:
    """All sparse GEMMs that one function of the generator gives."""
    library = _library().library
    from cutlass_library import generator, manifest

    arguments = ["--operations=gemm", "--cuda-version=13.0", f"--architectures={arch[3:]}"]
    options = generator.define_parser().parse_args(
        [*arguments, "--kernels=*", f"--instantiation-level={_LEVEL}"]
    )
    found = manifest.Manifest(options)
    getattr(generator, f"Generate{enumeration}")(found, options.cuda_version)
    return [
        candidate
        for by_capability in found.operations[library.OperationKind.Gemm].values()
        for candidates in by_capability.values()
        for candidate in candidates
        if candidate.gemm_kind in (library.GemmKind.Sparse, library.GemmKind.SparseUniversal3x)
    ]
