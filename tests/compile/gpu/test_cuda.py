"""On a CUDA device: every back end against the dense product, and what the plan says and keeps.

Not part of the suite: `make test-gpu` runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compile.gpu import crossover, machine
from secateur.compile.gpu.blocks import make_blocks
from secateur.compile.gpu.dispatch import BackEnd
from secateur.compile.gpu.held import GpuMatrix, hold, hold_each
from secateur.compile.quantize import round_tokens
from secateur.serve.linear import SparseLinear, kernel_report
from tests.compile.gpu.linears import HALVES, assert_product, draw
from tests.compile.gpu.modules import make

pytestmark = pytest.mark.gpu

IN_FP8: tuple[BackEnd, ...] = ("own-fp8", "cusparselt-fp8", "scaled-mm")
PATTERNS = ["2:4", "4:8", "50%", "80%", "50%@8x1"]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CROSSOVER", "built-in")


def each(pattern: str, values: Any, rows: int, columns: int) -> tuple[dict[Any, Any], torch.Tensor]:
    pieces, weight = draw(pattern, values, rows, columns, 64)
    found = hold_each(
        pieces.values.reshape(-1),
        pieces.bitmask,
        (rows, columns),
        pieces.layer.pattern,
        values,
        scales=pieces.scales,
        group_size=pieces.group_size,
        device=CUDA,
    )
    return dict(found), weight.cuda()


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "columns"), [(256, 512), (72, 328)])
def test_every_back_end_computes_the_product(
    pattern: str, values: Any, rows: int, columns: int
) -> None:
    matrices, weight = each(pattern, values, rows, columns)
    assert isinstance(matrices["triton"], GpuMatrix)
    dtype = HALVES.get(values, torch.bfloat16)
    bias = torch.randn(rows, device=CUDA).to(dtype)
    for end, matrix in matrices.items():
        if isinstance(matrix, str):
            print(f"{end}: {matrix}")
            continue
        exact = weight if end == "triton" else weight.to(dtype)
        for tokens in (1, 7, 16, 33, 64, 65, 200):
            x = torch.randn(tokens, columns, device=CUDA).to(dtype)
            y = matrix.multiply(x, bias)
            assert torch.equal(matrix.multiply(x), matrix.multiply(x))
            if end in IN_FP8:  # whose sums may have fewer bits, too
                rounded, scales = round_tokens(x)
                wanted = (rounded.float() * scales) @ weight.T + bias.float()
                assert float((y.float() - wanted).norm()) < 0.01 * float(wanted.norm())
            else:
                assert_product(y, x, exact, bias)


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("pattern", ["2:4", "60%"])
def test_unpacked_weights_are_exact(pattern: str, values: Any) -> None:
    pieces, weight = draw(pattern, values, 200, 328, 64)
    matrix = hold(pieces, "bf16", CUDA)
    assert isinstance(matrix, GpuMatrix)
    assert torch.equal(matrix.dense().cpu(), weight.bfloat16())


def test_a_large_layer() -> None:
    """More programs than run at once, and rows shared by several."""
    pieces, weight = draw("50%", "bf16", 2048, 2048)
    matrix = hold(pieces, "bf16", CUDA)
    assert isinstance(matrix, GpuMatrix)
    x = torch.randn(3, 2048, device=CUDA).bfloat16()
    assert_product(matrix.multiply(x), x, weight.cuda())


@pytest.mark.parametrize("values", ["bf16", "int4"])
def test_modules_move_there_and_back(values: Any) -> None:
    pieces, weight = draw("2:4", values, 128, 256)
    module = make(pieces, torch.bfloat16, bias=False)
    before = module.matrix
    module.cuda()
    assert isinstance(module.matrix, GpuMatrix)
    x = torch.randn(2, 3, 256, device=CUDA).bfloat16()
    with torch.no_grad():
        assert_product(module(x).reshape(6, 128), x.reshape(6, 256), weight.cuda())
    module.cpu()
    assert type(module.matrix) is type(before)


def test_two_four_takes_no_second_copy() -> None:
    pieces, weight = draw("2:4", "bf16", 1024, 1024)
    module = make(pieces, torch.bfloat16, bias=False).cuda()
    assert module.weight is None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    del module
    assert held - torch.cuda.memory_allocated() < 1.3 * weight.numel()  # bytes; dense takes 2


def test_a_compiled_module_serves_all_numbers_of_tokens() -> None:
    module = make(draw("2:4", "fp16", 128, 256)[0], torch.float16).cuda()
    traced: Any = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 300):
        x = torch.randn(tokens, 256, device=CUDA).half()
        with torch.no_grad():
            assert torch.equal(traced(x), module(x))


def test_a_product_can_be_captured_in_a_graph() -> None:
    pieces, weight = draw("2:4", "bf16", 256, 2048)
    matrix = hold(pieces, "bf16", CUDA)
    assert isinstance(matrix, GpuMatrix)
    x = torch.randn(1, 2048, device=CUDA).bfloat16()
    matrix.multiply(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matrix.multiply(x)
    x.normal_()
    graph.replay()
    assert_product(y, x, weight.cuda())


def test_the_crossover_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CROSSOVER", "measure")
    monkeypatch.setattr(crossover, "cache_directory", lambda: tmp_path)
    pieces, _ = draw("2:4", "bf16", 1024, 1024)
    first = hold(pieces, "bf16", CUDA)
    content = json.loads(crossover.cache_file().read_text())
    assert len(content["tokens"]) == 1
    monkeypatch.setattr(crossover, "time_plan", None)  # would fail if it were called
    second = hold(pieces, "bf16", CUDA)
    if isinstance(first, GpuMatrix):
        assert isinstance(second, GpuMatrix)
        assert first.plan == second.plan
        assert first.plan.source == "measured"
    else:
        assert first == second


def test_the_report_and_the_machine() -> None:
    facts = machine.read(CUDA)
    print(facts)
    assert "triton" not in facts.absent
    module = make(draw("2:4", "bf16", 256, 256)[0], torch.bfloat16).cuda()
    assert isinstance(module, SparseLinear)
    assert "Triton up to" in str(kernel_report(module)[0])


def test_blocks_are_the_same_there() -> None:
    blocks = make_blocks(draw("60%", "int4", 70, 160)[0])
    there = blocks.to(CUDA)
    assert torch.equal(there.values.cpu(), blocks.values)
    assert there.starts is not None
    assert there.starts.is_cuda
