"""CUTLASS's own host code, compiled from the headers in its wheel."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.compile import cpu

HERE = Path(__file__).parent
WHEELS = ("nvidia-cutlass", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")


def include_folders() -> list[Path]:
    """Where the headers of CUTLASS and of CUDA's host side are."""
    folders = [
        *(place / "source" / "include" for place in packages("cutlass_library")),
        *(place / "source" / "tools" / "util" / "include" for place in packages("cutlass_library")),
        *(place / "cu13" / "include" for place in packages("nvidia")),
        *(place / "cu13" / "include" / "cccl" for place in packages("nvidia")),
    ]
    headers = (
        "cutlass/cutlass.h",
        "cutlass/util/host_reorder.h",
        "cuda_fp16.h",
        "cuda/std/cassert",
    )
    for header in (*headers, "crt/host_config.h"):
        if not any((folder / header).exists() for folder in folders):
            pytest.fail(
                f"the header {header} is missing: install {', '.join(WHEELS)} (make install)"
            )
    return folders


def packages(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(place) for place in spec.submodule_search_locations or []] if spec else []


@pytest.fixture(scope="session")
def cutlass(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of cutlass_host.cpp. CUTLASS's headers take -fpermissive without nvcc."""
    library = tmp_path_factory.mktemp("cutlass") / "cutlass_host.so"
    includes = [word for folder in include_folders() for word in ("-isystem", str(folder))]
    flags = ["-std=c++17", "-O1", "-w", "-fpermissive", "-shared", "-fPIC"]
    source = str(HERE / "cutlass_host.cpp")
    try:
        subprocess.run(
            ["g++", *flags, *includes, source, "-o", str(library)],
            check=True,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.fail("there is no g++: CUTLASS's host code cannot be compiled")
    except subprocess.CalledProcessError as fault:
        pytest.fail(f"CUTLASS's host code does not compile:\n{fault.stderr[-4000:]}")
    return ctypes.CDLL(str(library))


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)
