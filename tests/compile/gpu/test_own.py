"""Our CUTLASS library as a back end, with a library of the same interface that runs on a CPU."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compile.gpu import held, machine
from secateur.compile.gpu import own as own_module
from secateur.compile.gpu.blocks import make_blocks
from secateur.compile.gpu.cutlass.library import SparseGemmLibrary, library_path
from secateur.compile.gpu.cutlass.source import HEADERS
from secateur.compile.gpu.dispatch import BackEnd, Machine, Plan
from secateur.compile.gpu.held import GpuMatrix, hold_each, weight_of
from secateur.compile.gpu.own import OwnProduct
from secateur.compile.quantize import round_tokens
from secateur.errors import EnvironmentFault
from secateur.serve.linear import kernel_report
from tests.compile.gpu.linears import HALVES, assert_product, draw
from tests.compile.gpu.modules import make

CPU = torch.device("cpu")
SOURCE = Path(__file__).with_name("fake_sparse_gemm.c")
Libraries = dict[str, SparseGemmLibrary]
COMBINATIONS = [
    *(("sm_80", values, values) for values in HALVES),
    *(("sm_90a", values, values) for values in HALVES),
    *(("sm_90a", "fp8", dtype) for dtype in HALVES),
]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    home, found = tmp_path_factory.mktemp("fake"), {}
    for arch, flags in (("sm_80", []), ("sm_90a", ["-DSM90"])):
        path = library_path(arch, home)
        command = ["gcc", "-O2", "-shared", "-fPIC", f"-I{HEADERS}", *flags, str(SOURCE)]
        subprocess.run([*command, "-o", str(path), "-lm"], check=True)
        found[arch] = SparseGemmLibrary(path)
    return found


@pytest.fixture
def use(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the library of an architecture found on every device."""

    def chosen(arch: str) -> None:
        for module in (held, machine):
            monkeypatch.setattr(module, "library_for", lambda _: libraries[arch])

    return chosen


def check(
    library: SparseGemmLibrary, values: str, name: str, shape: tuple[int, int], tokens: int
) -> None:
    """A product and its bias, against the dense weight and the inputs as they are rounded."""
    pieces, weight = draw("2:4", values, *shape)
    blocks, dtype = make_blocks(pieces), HALVES[name]
    product = OwnProduct(library, blocks, dtype)
    number = product._number(blocks.bits.shape[0], 64, 8 * blocks.bits.shape[1], CPU)
    extents = blocks.bits.shape[0], 8 * blocks.bits.shape[1]
    assert product.meta.nbytes == library.meta_bytes(number, *extents)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    given_ = x.float()
    if values == "fp8":
        rounded, scales = round_tokens(x)
        given_ = rounded.float() * scales
    for added in (None, bias):
        y = product.multiply(blocks, x, added)
        assert y.is_contiguous()
        exact = given_.double() @ weight.double().T
        exact = exact if added is None else exact + added.double()
        unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
        size = given_.double().abs() @ weight.double().abs().T
        assert y.shape == exact.shape
        assert bool(((y.double() - exact).abs() <= unit * exact.abs() + 2**-18 * size).all())


@pytest.mark.parametrize(("arch", "values", "name"), COMBINATIONS)
@pytest.mark.parametrize("shape", [(32, 128), (72, 264), (128, 384)])
def test_products(
    libraries: Libraries, arch: str, values: str, name: str, shape: tuple[int, int]
) -> None:
    for tokens in (1, 9, 16):
        check(libraries[arch], values, name, shape, tokens)


@settings(max_examples=15, deadline=None)
@given(
    which=st.sampled_from(COMBINATIONS),
    rows=st.integers(1, 80),
    groups=st.integers(1, 80),
    tokens=st.integers(1, 20),
)
def test_any_shape(
    libraries: Libraries, which: tuple[str, str, str], rows: int, groups: int, tokens: int
) -> None:
    arch, values, name = which
    check(libraries[arch], values, name, (rows, 4 * groups), tokens)


@pytest.mark.parametrize(("arch", "values", "name"), COMBINATIONS)
def test_the_rule_gives_it_many_tokens(
    use: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    values: str,
    name: str,
) -> None:
    use(arch)
    monkeypatch.setattr(held, "DEVICE", "cpu")
    monkeypatch.setattr(machine, "read", lambda _: Machine((8, 0) if arch == "sm_80" else (9, 0)))
    pieces, weight = draw("2:4", values, 64, 256)
    module = make(pieces, HALVES[name])
    up_to, in_fp8 = (16, " with inputs in fp8") if values == "fp8" else (1, "")
    tokens = f"{up_to} tokens" if up_to > 1 else "1 token"
    assert f"Triton up to {tokens}, secateur's CUTLASS{in_fp8} above" in str(
        kernel_report(module)[0]
    )
    assert isinstance(module.matrix, GpuMatrix)
    assert module.matrix.blocks.values.data_ptr() == module.weight_values.data_ptr()
    assert module.matrix.nbytes == 64 * 256 // 8 + (4 * 64 if values == "fp8" else 0)
    x = torch.randn(65, 256).to(HALVES[name])
    with torch.no_grad():
        many, few = module(x), module(x[:up_to])
    assert_product(few, x[:up_to], weight, module.bias.data)
    if values == "fp8":
        assert 0 < float((many[:up_to] - few).norm() / few.norm()) < 0.05
        rounded, scales = round_tokens(x)
        wanted = (rounded.float() * scales) @ weight.T + module.bias.float()
        assert torch.allclose(many.float(), wanted, rtol=0.02, atol=0.02)
    else:
        assert_product(many, x, weight, module.bias.data)


def test_copies_have_weights_of_their_own(use: Callable[[str], None]) -> None:
    use("sm_90a")
    pieces, weight = draw("2:4", "bf16", 40, 128)
    made = GpuMatrix(weight_of(pieces, "bf16"), Plan("own", "own"), make_blocks(pieces))
    again = copy.deepcopy(made)
    x = torch.randn(3, 128).bfloat16()
    made.blocks.values.zero_()
    assert made._meta is not None
    made._meta.zero_()
    assert not made.multiply(x).any()
    assert_product(again.multiply(x), x, weight)
    assert made.build == " fake"


def test_every_back_end_is_held_alone(
    use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `secateur bench kernels --device cuda` asks for them."""
    use("sm_90a")
    absent: dict[BackEnd, str] = {"cusparselt-fp8": "not here", "scaled-mm": "nor here"}
    monkeypatch.setattr(machine, "read", lambda _: Machine((9, 0), absent))
    pieces, weight = draw("2:4", "fp8", 32, 128)
    parts: dict[str, Any] = {"scales": pieces.scales, "group_size": None, "device": CPU}
    assert pieces.bitmask is not None
    found = hold_each(
        pieces.values.reshape(-1),
        pieces.bitmask,
        (32, 128),
        pieces.layer.pattern,
        "fp8",
        **parts,
    )
    assert list(found) == ["triton", "unpack", "own-fp8", "cusparselt-fp8", "scaled-mm"]
    assert str(found["scaled-mm"]).endswith("nor here")
    own = found["own-fp8"]
    assert isinstance(own, GpuMatrix)
    x = torch.randn(2, 128).bfloat16()
    right = x.float() @ weight.T
    assert float((own.multiply(x).float() - right).norm()) < 0.05 * float(right.norm())


@pytest.mark.parametrize("end", ["own", "own-fp8"])
def test_a_trial_product_decides(use: Callable[[str], None], end: BackEnd) -> None:
    use("sm_90a")
    assert machine._trial(end, CPU) is None


def test_what_is_absent_is_told(
    use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use("sm_80")
    said = machine._trial("own-fp8", CPU)
    assert said is not None
    assert said.endswith("has no kernels of fp8-bf16")
    monkeypatch.undo()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    said = machine._trial("own", CPU)
    assert said is not None
    assert "there are no compiled CUTLASS kernels" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(EnvironmentFault, match=r"no kernels for capability 7\.5"):
        own_module.library_for(CPU)
