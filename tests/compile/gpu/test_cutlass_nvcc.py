"""CUTLASS kernels compiled: their machine code, and what the library says and does without a GPU.

A kernel of every type, some minutes of nvcc: `make test-nvcc`. Nothing here runs a kernel.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from secateur.compile.gpu.cutlass import build
from secateur.compile.gpu.cutlass.build import Built, build_library
from secateur.compile.gpu.cutlass.kernels import TYPES, Kernel, cutlass_path
from secateur.compile.gpu.cutlass.library import (
    Operands,
    SparseGemmLibrary,
    architecture_for,
    library_path,
)
from secateur.compile.gpu.cutlass.source import HEADERS, kernel_source

pytestmark = [pytest.mark.nvcc, pytest.mark.timeout(1800)]

INSTRUCTIONS = {
    "sm_80-bf16-128x64x64": r"HMMA\.SP\.16832\.F32\.BF16",
    "sm_80-fp16-64x64x64": r"HMMA\.SP\.16832\.F32(?!\.BF16)\b",
    "sm_80-tf32-64x64x32": r"HMMA\.SP\.16816\.F32\.TF32",
    "sm_80-int8-bf16-64x64x128": r"IMMA\.SP\.16864\.S8\.S8\.SAT",
    "sm_90a-bf16-128x128x128": r"HGMMA\.SP\.64x128x32\.F32\.BF16",
    "sm_90a-int8-bf16-128x128x128": r"IGMMA\.SP\.64x128x64\.S8\.S8",
    "sm_90a-fp8-bf16-64x16x128": r"QGMMA\.SP\.64x16x64\.F32\.E4M3\.E4M3",
}
# Of sm_100a the PTX says it: in the machine code the metadata is an operand, not a modifier.
SM100 = {
    "sm_100a-bf16-128x128x64": ("tcgen05.mma.sp.cta_group::1.kind::f16", "UTCHMMA"),
    "sm_100a-fp8-bf16-128x128x128": ("tcgen05.mma.sp.cta_group::1.kind::f8f6f4", "UTCQMMA"),
}
CHOSEN = [Kernel.parse(name) for name in INSTRUCTIONS]
DENSE = r"\b[HIQ]G?MMA\.(?!SP)"


@dataclass(frozen=True)
class Compiled:
    """A library of the chosen kernels of one architecture."""

    built: Built
    library: SparseGemmLibrary
    code: list[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def compiled(request: pytest.FixtureRequest, home: Path) -> Compiled:
    arch = request.param
    built = build_library(arch, home, [kernel for kernel in CHOSEN if kernel.arch == arch])
    return Compiled(built, SparseGemmLibrary(built.path), disassembled(built.path))


def disassembled(path: Path) -> list[str]:
    """The machine code of each kernel."""
    spec = find_spec("triton")
    assert spec is not None, "the disassembler comes with triton: pip install triton"
    assert spec.origin is not None
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    said = subprocess.run(
        [tools / "cuobjdump", "-sass", path],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
    ).stdout
    return said.split("Function : ")[1:]


def test_each_kernel_is_sparse_tensor_core_code(compiled: Compiled) -> None:
    assert compiled.built.fresh
    assert compiled.built.warnings == ()
    assert len(compiled.code) == len(compiled.library.kernels)
    for facts in compiled.library.kernels:
        instruction = INSTRUCTIONS[facts.name]
        (code,) = [code for code in compiled.code if re.search(instruction, code)]
        assert not re.search(DENSE, code), facts.name
        assert not re.search(r"\b(LDL|STL)\b", code), f"{facts.name} spills registers"
        assert not re.search(r"\bCALL\b", code), f"{facts.name} calls functions"


def test_facts_of_the_kernels(compiled: Compiled) -> None:
    library = compiled.library
    arch = compiled.built.path.stem.removeprefix("sparse_gemm_")
    assert [k.name for k in library.kernels] == [k.name for k in CHOSEN if k.arch == arch]
    for number, facts in enumerate(library.kernels):
        kernel = Kernel.parse(facts.name)
        bits = TYPES[kernel.types].bits
        out = 4 if kernel.types == "tf32" else 8
        assert library.number(facts.name) == number
        assert facts.tile == kernel.tile
        assert facts.stages >= 2
        assert "spgemm" in facts.operation
        assert 0 < facts.shared_bytes <= (163 if arch == "sm_80" else 227) << 10
        assert facts.multiple_b * bits == 128
        assert facts.multiple_d == out
        if arch == "sm_80":  # the multiples of secateur.compile.gpu.sm80
            rows, columns = {8: (16, 128), 16: (32, 64), 32: (32, 32)}[bits]
            assert facts.multiples == (rows, out, columns)
            assert (facts.d_column_major, facts.meta_tile_k) == (False, 0)
            nibbles = 4096 // (2 if bits == 32 else 4)
            assert library.meta_bytes(number, 96, 4096) == 96 * nibbles // 2
        else:
            assert facts.multiples == (out, 1, 2 * facts.multiple_b)
            assert (facts.d_column_major, facts.meta_tile_k) == (True, 128)
            assert library.meta_bytes(number, 80, 4096 + 32) == 128 * (4096 + 128) // 8
        assert library.workspace_bytes(number, 4096, 512, 4096) == 0
        m, n, k = facts.multiples
        assert facts.accepts(m, n, k)
        assert not facts.accepts(m, n, k + 1)
        assert library.usable(kernel.types, 4096, 64, 4096) == [kernel]
        assert library.usable(kernel.types, 4096, 64, 4096, facts.shared_bytes - 1) == []


@pytest.mark.parametrize("name", SM100)
def test_sm100_is_sparse_code_that_no_gpu_is_given(name: str, tmp_path: Path) -> None:
    kernel, (instruction, machine) = Kernel.parse(name), SM100[name]
    built = build_library("sm_100a", tmp_path, [kernel])
    (facts,) = SparseGemmLibrary(built.path).kernels
    assert (facts.name, facts.meta_tile_k, facts.d_column_major) == (name, -1, True)
    (code,) = disassembled(built.path)
    assert re.search(rf"\b{machine}\b", code)
    assert not re.search(r"\b(LDL|STL)\b", code)
    source = tmp_path / "kernel.cu"
    source.write_text(kernel_source(kernel))
    includes = [f"-I{HEADERS}", f"-I{cutlass_path() / 'include'}"]
    flags = [*build._FLAGS[:-1], "-arch=compute_100a", "-ptx", *includes]
    command = [str(build.find_nvcc().path), *flags, str(source), "-o", str(tmp_path / "kernel.ptx")]
    subprocess.run(command, check=True, capture_output=True)
    multiplied = re.findall(r"tcgen05\.mma\S*", (tmp_path / "kernel.ptx").read_text())
    assert multiplied
    assert set(multiplied) == {instruction}
    assert architecture_for((10, 0)) == "sm_80"


SCRIPT = """
import ctypes, json, sys
from secateur.compile.gpu.cutlass.library import Operands, SparseGemmLibrary
library = SparseGemmLibrary(sys.argv[1])
operands = Operands(256, 128, 512, 4096, 4096, 4096, 512, 4096, 256)
status = library.try_launch(0, operands)
print(json.dumps([status, library.message(status)]))
library.launch(0, operands)
"""


def test_launching_without_a_gpu_is_a_clean_status(compiled: Compiled) -> None:
    """In a process that sees no GPU, whether or not there is a driver."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, compiled.built.path],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    status, message = json.loads(ran.stdout)
    assert status in (1000 + 100, 1000 + 35)  # cudaErrorNoDevice, cudaErrorInsufficientDriver
    assert "CUDA" in message
    assert f"EnvironmentFault: sparse GEMM {compiled.library.kernels[0].name}" in ran.stderr


def test_wrong_arguments_are_told_before_the_gpu_is_asked(compiled: Compiled) -> None:
    library, facts = compiled.library, compiled.library.kernels[0]
    good = Operands(256, 128, 512, 4096, 4096, 4096, 512, 4096, 256)
    wrong = {
        101: [replace(good, **{axis: bad}) for axis in "mnk" for bad in (0, -256)]
        + [replace(good, m=256 + 1), replace(good, k=512 + 8)],
        102: [
            replace(good, ldb=512 - facts.multiple_b),
            replace(good, ldb=512 + 1),
            replace(good, ldd=64),
            replace(good, ldd=256 + 1),
        ],
        103: [replace(good, **{name: 0}) for name in ("values", "meta", "b", "d")],
    }
    for status, every in wrong.items():
        for operands in every:
            assert library.try_launch(0, operands) == status, operands
    for number in (-1, len(library.kernels)):
        assert library.try_launch(number, good) == 100
        assert library.meta_bytes(number, 256, 512) == -1
        assert library.workspace_bytes(number, 256, 128, 512) == -1
    said = {library.message(status) for status in (0, 7, *range(100, 107), 1000 + 100)}
    assert len(said) == 10


def test_an_up_to_date_library_is_kept(
    compiled: Compiled, home: Path, secateur_command: Callable[..., Any]
) -> None:
    path = compiled.built.path
    arch = path.stem.removeprefix("sparse_gemm_")
    assert path == library_path(arch, home)
    before = path.stat().st_mtime_ns
    again = build_library(arch, home, [kernel for kernel in CHOSEN if kernel.arch == arch])
    assert (again.fresh, again.kernels) == (False, compiled.built.kernels)
    assert path.stat().st_mtime_ns == before
    assert not build._is(path, "another key")
    assert list(home.glob("*.partial")) == []
    said = secateur_command("doctor", "-o", home).stdout
    assert f"{arch}: {len(compiled.library.kernels)} kernels (CUTLASS " in said


def test_the_library_needs_no_driver(compiled: Compiled) -> None:
    """It is linked with no library of the driver, and the CUDA runtime is inside."""
    needed = subprocess.run(
        ["ldd", compiled.built.path], capture_output=True, text=True, check=True
    ).stdout
    assert "libcuda" not in needed
    assert ctypes.CDLL(str(compiled.built.path)).secateur_abi() == 1
