"""Which CUTLASS kernels there are, their sources and their choice: all that needs no compiler."""

from __future__ import annotations

import builtins
import fcntl
import json
import re
import stat
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile import _kernels
from secateur.compile.gpu.cutlass import build, tiles
from secateur.compile.gpu.cutlass.kernels import (
    ARCHITECTURES,
    TYPES,
    Kernel,
    cutlass_path,
    kernels_of,
    operation,
)
from secateur.compile.gpu.cutlass.library import (
    SparseGemmLibrary,
    architecture_for,
    library_path,
    open_library,
)
from secateur.compile.gpu.cutlass.source import kernel_source, registry_source
from secateur.compile.gpu.cutlass.tiles import (
    Row,
    TileTable,
    Timing,
    choose,
    current_table,
    refreshed,
    table_path,
)
from secateur.errors import EnvironmentFault, ModelError, UsageError

EVERY = [kernel for arch in ARCHITECTURES for kernel in kernels_of(arch)]
ONE_TYPE = [(arch, types) for arch in ARCHITECTURES for types in ARCHITECTURES[arch].types]


def of(arch: str, types: str) -> list[Kernel]:
    return [kernel for kernel in kernels_of(arch) if kernel.types == types]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cutlass_has_every_kernel(arch: str) -> None:
    names = set()
    for kernel in kernels_of(arch):
        found = operation(kernel)
        wanted = TYPES[kernel.types]
        if arch != "sm_80":
            assert found.D.layout.name == "ColumnMajor"
        assert Kernel.parse(kernel.name) == kernel
        assert found.A.element.name == found.B.element.name == wanted.inputs
        assert found.D.element.name == wanted.output
        assert found.accumulator_type().name == wanted.sums
        assert "sp" in found.procedural_name()
        assert wanted.output in found.procedural_name() or arch == "sm_80"
        names.add(found.procedural_name() + wanted.output)
    assert len(names) == len(kernels_of(arch))
    with pytest.raises(UsageError, match=r"'sm_81'.*\n.*did you mean 'sm_80'"):
        kernels_of("sm_81")


def test_enumerating_leaves_cutlass_descriptions_as_they_are() -> None:
    first = operation(Kernel.parse("sm_80-int8-bf16-64x64x128"))
    second = operation(Kernel.parse("sm_80-int8-fp16-64x64x128"))
    assert (first.D.element.name, second.D.element.name) == ("bf16", "f16")


def test_kernels_of_a_type_read_one_weight() -> None:
    """The order of SM90's metadata depends on the tile's K, and a weight is packed once."""
    for arch, types in ONE_TYPE:
        assert len({kernel.tile[2] for kernel in of(arch, types)}) == 1


def test_sources_name_what_is_asked_for() -> None:
    source = kernel_source(Kernel.parse("sm_80-int8-fp16-128x64x128"))
    assert "GemmShape<\n    128, 64, 128>" in source
    assert re.search(r"SparseGemmWithVisitor<\s*int8_t, .*\s*cutlass::half_t, .*\s*int32_t", source)
    source = kernel_source(Kernel.parse("sm_90a-fp8-bf16-64x16x128"))
    assert "cute::Shape<cute::_64, cute::_16, cute::_128>" in source
    assert "Epilogue<cutlass::bfloat16_t" in source
    assert "KernelTmaWarpSpecializedPingpongFP8FastAccum" in source
    assert "OpClassSparseTensorOp" in source
    for kernel in EVERY:
        assert "${" not in kernel_source(kernel), kernel.name


def test_the_registry_numbers_kernels_in_order() -> None:
    source = registry_source(EVERY[:2], "a key", "versions")
    assert "entries[] = {&sm_80_bf16_64x64x64, &sm_80_bf16_128x64x64}" in source
    assert "#define SECATEUR_RUNS_ON 80, false" in source
    assert "90, true" in registry_source([kernels_of("sm_90a")[0]], "", "")


def test_the_key_covers_sources_versions_and_architecture() -> None:
    keys = {
        build.build_key({"a": text}, versions, arch)
        for text, versions, arch in product("xy", "vw", ARCHITECTURES)
    }
    assert len(keys) == 4 * len(ARCHITECTURES)
    assert build.build_key({"a": "x"}, "v", "sm_80") in keys


def test_headers_are_found() -> None:
    assert (cutlass_path() / "include/cutlass/gemm/device/gemm_sparse_with_visitor.h").is_file()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_80")],
)
def test_the_newest_kernels_that_run(capability: tuple[int, int], arch: str | None) -> None:
    assert architecture_for(capability) == arch


# --- the table of tiles -------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 40000), st.integers(1, 20000), st.integers(1, 30000))


DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_shipped_table_is_what_was_measured_before_the_model() -> None:
    told = json.loads((DOCS / "gpu" / "h100-cutlass.json").read_text(encoding="utf-8"))
    timings = [
        tiles.Timing(Kernel.parse(name), m, n, k, us * 1e-6)
        for name, m, n, k, us in told["timings"]
        if name != "dense"
    ]
    source = f"measured on {told['device']}, {told['date']}, {told['versions']}"
    assert TileTable.read() == tiles.refreshed(tiles.modelled(), timings, source)


@given(SHAPES, st.sampled_from(ONE_TYPE))
def test_every_shape_has_a_row_of_a_kernel_that_is_built(
    shape: tuple[int, int, int], one: tuple[str, str]
) -> None:
    rows = [row for row in TileTable.read().rows if row.holds(*one, *shape)]
    assert rows
    assert choose(TileTable.read(), of(*one), *shape).name == rows[0].kernel


@given(SHAPES, st.sampled_from(ONE_TYPE), st.data())
def test_the_choice_is_usable_and_else_the_quickest_by_the_model(
    shape: tuple[int, int, int], one: tuple[str, str], data: st.DataObject
) -> None:
    usable = data.draw(st.lists(st.sampled_from(of(*one)), min_size=1, unique=True))
    assert choose(TileTable.read(), usable, *shape) in usable
    seconds = {kernel: tiles.predicted_seconds(kernel, *shape) for kernel in usable}
    assert seconds[choose(TileTable("", ()), usable, *shape)] == min(seconds.values())


def test_no_usable_kernel_is_told() -> None:
    with pytest.raises(UsageError, match="m 30, n 8, k 64"):
        choose(TileTable.read(), [], 30, 8, 64)


def test_the_model_by_hand() -> None:
    """One wave and two, bound by multiplication; and a wide thin product, bound by memory."""
    device = tiles.DEVICES["sm_80"]
    kernel = Kernel.parse("sm_80-bf16-256x128x64")
    one = tiles.predicted_seconds(kernel, 256 * 12, 128 * 9, 4096)
    block = 2 * 256 * 128 * 4096 / (2 * device.flops / 108)
    load = (256 * 1.125 + 128 * 2) * 4096 / (device.l2_bandwidth / 108)
    assert one == pytest.approx(max(block, load))
    assert tiles.predicted_seconds(kernel, 256 * 12 + 1, 128 * 9, 4096) == pytest.approx(2 * one)
    thin = tiles.predicted_seconds(Kernel.parse("sm_80-int8-bf16-64x64x128"), 4096, 1, 14336)
    assert thin == pytest.approx((4096 * 14336 * 0.625 + 14336) / device.bandwidth)
    tf32 = tiles.predicted_seconds(Kernel.parse("sm_80-tf32-64x64x32"), 4096, 1, 14336)
    assert tf32 == pytest.approx((4096 * 14336 * 2.25 + 14336 * 4) / device.bandwidth)


TIMINGS = st.lists(
    st.builds(
        Timing,
        st.sampled_from(of("sm_80", "bf16") + of("sm_90a", "int8-bf16")),
        *(st.sampled_from([64, 4096, 9000]) for _ in range(3)),
        st.floats(1e-6, 1),
    )
)


@given(TIMINGS)
def test_a_measured_shape_gets_its_fastest_kernel(timings: list[Timing]) -> None:
    table = refreshed(tiles.modelled(), timings, "measured")
    for timing in timings:
        kernel = timing.kernel
        shape = timing.m, timing.n, timing.k
        rivals = [t for t in timings if (t.m, t.n, t.k) == shape]
        rivals = [t for t in rivals if t.kernel.arch == kernel.arch]
        chosen = choose(table, of(kernel.arch, kernel.types), *shape)
        assert min(t.seconds for t in rivals) == min(
            t.seconds for t in rivals if t.kernel == chosen
        )
    again = refreshed(table, timings, "measured")
    assert again.rows == table.rows
    old = set(tiles.modelled().rows)
    assert {r for r in table.rows if r in old} | {r for r in table.rows[: len(timings)]} >= old


def test_larger_shapes_than_measured_are_left_to_the_model(tmp_path: Path) -> None:
    slow = Kernel.parse("sm_80-bf16-64x64x64")
    table = refreshed(TileTable.read(), [Timing(slow, 4096, 4096, 4096, 1.0)], "measured")
    assert choose(table, of("sm_80", "bf16"), 4096, 4096, 4096) == slow
    for shape in ((4097, 4096, 4096), (4096, 4097, 4096), (4096, 4096, 4160)):
        wanted = choose(TileTable.read(), of("sm_80", "bf16"), *shape)
        assert choose(table, of("sm_80", "bf16"), *shape) == wanted != slow
    table.write(tmp_path / "tiles.json")
    assert TileTable.read(tmp_path / "tiles.json") == table
    (tmp_path / "tiles.json").write_text(json.dumps({"source": "", "rows": [["sm_80", 3]]}))
    with pytest.raises(ModelError, match=r"tiles\.json is no table of tiles"):
        TileTable.read(tmp_path / "tiles.json")


def test_rows_hold_for_their_types_alone() -> None:
    row = Row("sm_80", "bf16", None, None, None, "x")
    assert row.holds("sm_80", "bf16", 1, 1, 1)
    assert not row.holds("sm_80", "fp16", 1, 1, 1)
    assert not row.holds("sm_90a", "bf16", 1, 1, 1)


# --- what can be missing ------------------------------------------------------------------------


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def fake_nvcc(home: Path, says: str, status: int = 0) -> None:
    (home / "bin").mkdir(exist_ok=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)


def test_no_nvcc(no_toolkit: Path, secateur_command: Callable[..., Any]) -> None:
    ran = secateur_command("doctor", "--build-cutlass", "--arch", "sm_80")
    assert ran.returncode == 4
    assert f"there is no nvcc in $CUDA_HOME ({no_toolkit})" in ran.stderr
    assert "install the CUDA toolkit" in ran.stderr
    ran = secateur_command("doctor", "--build-cutlass", "--arch", "sm_80,sm_7")
    assert ran.returncode == 2
    assert "'sm_7'" in ran.stderr
    assert not (no_toolkit / "cache").exists()


def test_no_gpu_to_tune_on(no_toolkit: Path, secateur_command: Callable[..., Any]) -> None:
    ran = secateur_command("doctor", "--tune-cutlass", "--json")
    assert ran.returncode == 4
    assert "sees no CUDA device" in json.loads(ran.stdout)["error"]["message"]


def test_doctor_says_what_is_built(no_toolkit: Path, secateur_command: Callable[..., Any]) -> None:
    library_path("sm_80").parent.mkdir(parents=True)
    library_path("sm_80").write_bytes(b"no library")
    facts = json.loads(secateur_command("doctor", "--json").stdout)
    assert f"sm_80: {library_path('sm_80')} holds no sparse GEMMs" in facts["cutlass"]
    assert "sm_90a: not built" in facts["cutlass"]


@pytest.mark.parametrize(
    ("says", "status", "message"),
    [
        ("Cuda compilation tools, release 12.2, V12.2.140", 0, "V12.2.140.* need 12.4"),
        ("I am a teapot", 0, "teapot.* need 12.4"),
        ("V13.0.88", 1, "does not run"),
    ],
)
def test_a_bad_nvcc(no_toolkit: Path, says: str, status: int, message: str) -> None:
    fake_nvcc(no_toolkit, says, status)
    with pytest.raises(EnvironmentFault, match=message):
        build.find_nvcc()


def test_a_failed_compilation_leaves_no_library(no_toolkit: Path) -> None:
    fake_nvcc(no_toolkit, "V13.0.88")
    nvcc = no_toolkit / "bin" / "nvcc"
    nvcc.write_text(
        nvcc.read_text().replace(
            "exit 0", '[ "$1" = --version ] || { echo "x.cu: error: odd" >&2; exit 2; }'
        )
    )
    with pytest.raises(EnvironmentFault, match=r"nvcc failed with status 2: x\.cu: error: odd"):
        build.build_library("sm_80", only=kernels_of("sm_80")[:1])
    assert not library_path("sm_80").exists()
    (work,) = library_path("sm_80").parent.glob("*.partial")
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="written by another process"):
            build.build_library("sm_80", only=kernels_of("sm_80")[:1])


def test_a_tuned_table_is_preferred(no_toolkit: Path) -> None:
    assert current_table("sm_80") == TileTable.read()
    tuned = TileTable("measured", TileTable.read().rows[:3])
    table_path("sm_80").parent.mkdir(parents=True)
    tuned.write(table_path("sm_80"))
    assert current_table("sm_80") == tuned
    assert current_table("sm_90a") == TileTable.read()


def test_no_cutlass(no_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(no_toolkit, "V13.0.88")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cutlass_library"):
            raise ImportError("No module named 'cutlass_library'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentFault, match=r"CUTLASS is not installed") as caught:
        build.build_library("sm_80")
    assert "--no-deps nvidia-cutlass" in caught.value.fix


def test_no_library(no_toolkit: Path) -> None:
    with pytest.raises(EnvironmentFault, match="no compiled CUTLASS kernels") as caught:
        open_library("sm_80")
    assert "--build-cutlass" in caught.value.fix
    with pytest.raises(EnvironmentFault, match="holds no sparse GEMMs"):
        SparseGemmLibrary(Path(_kernels.__file__))  # a library, but another
