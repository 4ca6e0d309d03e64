"""secateur::linear: what it computes, what it refuses, what torch makes of it when it traces."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from secateur.compile import _kernels, torch_ops
from secateur.compile.cpu import pack
from secateur.compile.torch_ops import HeldMatrix
from secateur.pattern import Pattern

ROWS, COLUMNS = 24, 40
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = {"op": torch.ops.secateur.linear.default, "python": torch_ops._multiply}


def held(seed: int = 0) -> tuple[HeldMatrix, torch.Tensor]:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    shape = (ROWS, COLUMNS)
    return HeldMatrix(pack(weight.numpy(), None, shape, Pattern.parse("dense"), "fp32")), weight


def test_the_op_is_the_one_in_cpp() -> None:
    assert torch_ops.OBSTACLE is None
    assert torch_ops.linear is torch.ops.secateur.linear.default


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [None, *TYPES])
def test_types(way: str, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    matrix, weight = held()
    added = None if bias is None else torch.randn(ROWS).to(bias)
    for shape in [(), (3,), (2, 3), (0,), (40,)]:
        x = torch.randn(*shape, COLUMNS).to(dtype)
        y = WAYS[way](x, matrix.handle, added)
        wanted = linear(x.float(), weight, None if added is None else added.float())
        assert (y.dtype, y.shape) == (dtype, wanted.shape)
        tight = 1e-5 if dtype == torch.float32 else 8e-3  # one rounding
        assert torch.allclose(y.float(), wanted, rtol=tight, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    diagonal = torch.diag(torch.full((8,), 1.0))
    matrix = HeldMatrix(pack(diagonal.numpy(), None, (8, 8), Pattern.parse("dense"), "fp32"))
    x = torch.tensor([[0.0, -1.5, 6e-8, 3e-39, 65504.0, float("inf"), float("nan"), 1.00390625]])
    for place in range(8):
        one = torch.zeros(1, 8, dtype=dtype)
        one[0, place] = x[0, place]
        y = torch_ops.linear(one, matrix.handle)
        assert torch.equal(y[0, place].isnan(), one[0, place].isnan())
        if not one.isnan().any() and not one.isinf().any():
            assert torch.equal(y, one)
    bias = torch.tensor(
        [2.0**-9, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 70000.0, 1e-8, -(2.0**-25), 3e38, 1]
    )
    zero = torch.zeros(1, 8, dtype=dtype)
    assert torch.equal(torch_ops.linear(zero, matrix.handle, bias)[0], bias.to(dtype))


@pytest.mark.parametrize("way", WAYS)
def test_strides(way: str) -> None:
    matrix, weight = held()
    x, bias = torch.randn(COLUMNS, 6).T, torch.randn(2 * ROWS)[::2]
    y = WAYS[way](x, matrix.handle, bias)
    assert torch.allclose(y, linear(x, weight, bias), atol=1e-5)
    assert y.is_contiguous()


def test_what_is_refused() -> None:
    matrix, _ = held()
    x = torch.randn(2, COLUMNS)
    for arguments, said in [
        ((x, 0), "there is no matrix 0"),
        ((x, -5), "there is no matrix -5"),
        ((x, 1 << 40), "there is no matrix"),
        ((x[:, 1:], matrix.handle), "takes inputs of 40 columns, not 39"),
        ((torch.tensor(1.0), matrix.handle), "takes inputs of 40 columns"),
        ((x.double(), matrix.handle), "takes float32, bfloat16 and float16"),
        ((x.int(), matrix.handle), "takes float32, bfloat16 and float16"),
        ((x, matrix.handle, torch.zeros(ROWS + 1)), "takes 24 biases"),
        ((x, matrix.handle, torch.zeros(1, ROWS)), "takes 24 biases"),
        ((x, matrix.handle, torch.zeros(ROWS).double()), "takes float32, bfloat16 and float16"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            torch_ops.linear(*arguments)


def test_a_released_matrix_is_unknown() -> None:
    matrix, _ = held()
    again = HeldMatrix(matrix.matrix)
    handle, x = matrix.handle, torch.randn(1, COLUMNS)
    wanted = torch_ops.linear(x, handle)
    del matrix
    gc.collect()
    with pytest.raises(RuntimeError, match=f"there is no matrix {handle}"):
        torch_ops.linear(x, handle)
    with pytest.raises(ValueError, match=f"there is no matrix {handle}"):
        torch_ops._multiply(x, handle)
    _kernels.release(handle)  # once more: nothing happens
    assert torch.equal(torch_ops.linear(x, again.handle), wanted)  # the matrix itself lives on
    assert again.handle > handle
    assert held()[0].handle > again.handle  # no number twice


def test_release_during_products() -> None:
    matrix, weight = held()
    x, handles, outcomes = torch.randn(1, COLUMNS), [matrix.handle], []
    wanted, stop = linear(x, weight), threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                outcomes.append(torch.allclose(torch_ops.linear(x, handles[0]), wanted, atol=1e-5))
            except RuntimeError as fault:
                outcomes.append("there is no matrix" in str(fault))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        old, matrix = matrix, held()[0]
        handles[0] = matrix.handle
        del old
    stop.set()
    for thread in threads:
        thread.join()
    assert outcomes
    assert all(outcomes)


def test_torchs_own_checks() -> None:
    matrix, _ = held()
    x, bias = torch.randn(2, 3, COLUMNS), torch.randn(ROWS)
    for arguments in [(x, matrix.handle), (x, matrix.handle, bias), (x.bfloat16(), matrix.handle)]:
        torch.library.opcheck(torch.ops.secateur.linear.default, arguments)


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = held(1)[0], held(1)[0]
        self.bias = torch.nn.Parameter(torch.randn(ROWS), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch_ops.linear(x, self.first.handle, self.bias)
        return torch.relu(y) * torch_ops.linear(x, self.second.handle)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_module_is_traced_without_a_break(backend: str) -> None:
    module = Pair()
    with torch.no_grad():
        traced = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
        for tokens in (1, 5, 33):
            x = torch.randn(tokens, COLUMNS)
            assert torch.allclose(traced(x), module(x), atol=1e-5)


def test_it_can_be_exported() -> None:
    module, x = Pair(), torch.randn(3, COLUMNS)
    program = torch.export.export(module, (x,))
    assert "torch.ops.secateur.linear.default" in program.graph_module.code
    assert torch.allclose(program.module()(x), module(x), atol=1e-5)


def run(script: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    assert "leak" not in ran.stderr
    return ran.stdout


USE = """
import torch, numpy as np
{before}
from secateur.compile import torch_ops
from secateur.compile.cpu import pack
from secateur.pattern import Pattern
eye = pack(np.eye(8, dtype=np.float32), None, (8, 8), Pattern.parse("dense"), "fp32")
kept = torch_ops.HeldMatrix(eye)
f = torch.compile(lambda x: torch_ops.linear(x, kept.handle), backend="eager", fullgraph=True)
x = torch.arange(8.0)
for y in (torch_ops.linear(x, kept.handle), f(x), torch.ops.secateur.linear(x, kept.handle)):
    assert torch.equal(y, x)
print(torch_ops.OBSTACLE)
"""


def test_a_process_ends_with_matrices_in_it() -> None:
    assert run(USE.format(before="")).strip() == "None"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import pathlib; pathlib.Path.exists = lambda self: False", "torch was not importable"),
        ("def broken(path): raise OSError('undefined symbol')\ntorch.ops.load_library = broken",
         "cannot load it: undefined symbol"),
    ],
)  # fmt: skip
def test_without_the_cpp_library_the_op_is_in_python(before: str, said: str) -> None:
    assert said in run(USE.format(before=before))


def test_the_library_alone_refuses_to_compute() -> None:
    library = str(Path(_kernels.__file__).with_name("_torch_ops.so"))
    script = f"""
import torch
torch.ops.load_library({library!r})
try:
    torch.ops.secateur.linear(torch.zeros(1, 8), 1)
except RuntimeError as fault:
    print(fault)
"""
    assert "import secateur.compile.torch_ops first" in run(script)


def test_a_table_of_another_version_is_refused() -> None:
    library: Any = ctypes.CDLL(str(Path(_kernels.__file__).with_name("_torch_ops.so")))
    other = (ctypes.c_int64 * 3)(99, 0, 0)
    assert library.secateur_connect(ctypes.byref(other)) == 0


def test_products_in_torchs_threads() -> None:
    """The same products, also of many callers at once."""
    from secateur.compile import cpu

    before, torch_before = cpu.threads(), torch.get_num_threads()
    weight = torch.randn(640, 512)
    matrix = HeldMatrix(pack(weight.numpy(), None, (640, 512), Pattern.parse("dense"), "fp32"))
    inputs = [torch.randn(tokens, 512) for tokens in (1, 5, 70)]
    wanted = [torch_ops.linear(x, matrix.handle) for x in inputs]
    try:
        torch.set_num_threads(3)
        torch_ops.borrow_torch_threads()
        assert cpu.threads() == 3
        found: list[list[torch.Tensor]] = [[] for _ in range(4)]

        def ask(place: int) -> None:
            found[place] = [torch_ops.linear(x, matrix.handle) for x in inputs for _ in range(20)]

        callers = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        for products in found:
            for i, product in enumerate(products):
                assert torch.equal(product, wanted[i // 20])
    finally:
        torch.set_num_threads(torch_before)
        cpu.set_threads(before)
    assert cpu.threads() == before
    assert torch.equal(torch_ops.linear(inputs[2], matrix.handle), wanted[2])
