"""CUTLASS's sparse GEMMs: enumerated, compiled here with nvcc, called through a C interface.

docs/gpu.md says how to build them and which one computes what.
"""

from __future__ import annotations

from secateur.compile.gpu.cutlass.build import Built, build_library
from secateur.compile.gpu.cutlass.kernels import ARCHITECTURES, TYPES, Kernel, kernels_of
from secateur.compile.gpu.cutlass.library import (
    KernelFacts,
    Operands,
    SparseGemmLibrary,
    architecture_for,
    library_path,
    open_library,
)
from secateur.compile.gpu.cutlass.tiles import TileTable, choose, current_table

__all__ = [
    "ARCHITECTURES",
    "TYPES",
    "Built",
    "Kernel",
    "KernelFacts",
    "Operands",
    "SparseGemmLibrary",
    "TileTable",
    "architecture_for",
    "build_library",
    "choose",
    "current_table",
    "kernels_of",
    "library_path",
    "open_library",
]
