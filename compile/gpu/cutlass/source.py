"""The CUDA C++ that is compiled: a file for each kernel, and the registry of all of them.

The GEMMs are written by cutlass_library's emitters, with our epilogue in place of theirs; sm80.cuh
and sm90.cuh beside this file bring them behind the interface of sparse_gemm.h.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.compile.gpu.cutlass.kernels import ARCHITECTURES, Kernel, operation

HEADERS = Path(__file__).parent

_SM80 = """
using WarpShape = cutlass::gemm::GemmShape<${warp_shape_m}, ${warp_shape_n}, ${warp_shape_k}>;
using TileShape = cutlass::gemm::GemmShape<
    ${threadblock_shape_m}, ${threadblock_shape_n}, ${threadblock_shape_k}>;
using Fused = secateur::sm80::Epilogue<${element_c}, TileShape, WarpShape>;
using Output = ${element_c};
using Gemm = cutlass::gemm::device::SparseGemmWithVisitor<
    ${element_a}, ${layout_a}, ${element_b}, ${layout_b}, ${element_c}, ${layout_c},
    ${element_accumulator}, ${opcode_class}, ${arch}, TileShape, WarpShape,
    cutlass::gemm::GemmShape<
        ${instruction_shape_m}, ${instruction_shape_n}, ${instruction_shape_k}>,
    Fused::Tree, ${swizzling_functor}, ${stages}, ${align_a}, ${align_b}, ${math_operation}>;
"""

_SM90_EPILOGUE = """secateur::sm90::Epilogue<${element_d},
    cute::Shape<cute::_${tile_shape_m}, cute::_${tile_shape_n}, cute::_${tile_shape_k}>>::Tree"""

_SM90 = """
using TileShape = Gemm::TileShape;
using Output = Gemm::ElementD;
using Fused = secateur::sm90::Epilogue<Output, TileShape>;
"""


def kernel_source(kernel: Kernel) -> str:
    """The translation unit of one kernel, which defines its entry in the registry.

    Raises:
        EnvironmentFault: nvidia-cutlass is not installed, or has no such GEMM.
    """
    found = operation(kernel)
    family = "sm80" if kernel.arch == "sm_80" else "sm90"
    gemm = _emit_sm80(found) if family == "sm80" else _emit_sm90(found)
    return f"""// {kernel.name}
#include "{family}.cuh"

namespace {{
{gemm}
}}  // namespace

namespace secateur {{
extern const Entry {_identifier(kernel)};
const Entry {_identifier(kernel)} = {family}::Kernel<Gemm, Fused, Output>::entry(
    "{kernel.name}", "{found.procedural_name()}");
}}  // namespace secateur
"""


def _emit_sm80(found: Any) -> str:
    from cutlass_library.gemm_operation import EmitSparseGemmInstance

    emitter = EmitSparseGemmInstance()
    emitter.gemm_template = _SM80
    return str(emitter.emit(found))


def _emit_sm90(found: Any) -> str:
    from cutlass_library.gemm_operation import EmitGemmUniversal3xInstance

    emitter = EmitGemmUniversal3xInstance()
    emitter.builtin_epilogue_functor_template = _SM90_EPILOGUE
    return f"{emitter.emit(found)}using Gemm = {found.procedural_name()};\n{_SM90}"


def registry_source(kernels: list[Kernel], key: str, versions: str) -> str:
    """The translation unit of the C interface.

    Args:
        kernels: in the order of their numbers; all of one architecture.
        key, versions: what the library says it was built from.
    """
    target = ARCHITECTURES[kernels[0].arch]
    names = [_identifier(kernel) for kernel in kernels]
    runs_on = f"{target.capability}, {str(target.exact).lower()}"
    return f"""#define SECATEUR_BUILD_KEY "{key}"
#define SECATEUR_BUILD_VERSIONS "{versions}"
#define SECATEUR_RUNS_ON {runs_on}
#include "entry.h"

namespace secateur {{
extern const Entry {", ".join(names)};
static Entry const* const entries[] = {{{", ".join(f"&{name}" for name in names)}}};
constexpr int32_t kEntryCount = {len(names)};
}}  // namespace secateur

#include "registry.cuh"
"""


def _identifier(kernel: Kernel) -> str:
    return kernel.name.replace("-", "_")
