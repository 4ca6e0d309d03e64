"""Packed linears on the path of a GPU, with its kernels interpreted and a CPU in its place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from secateur.compile.gpu import cusparselt, held, machine, sm80
from secateur.compile.gpu.dispatch import Machine
from secateur.serve.linear import kernel_report
from secateur.serve.vllm.product import Product, make_product
from tests.compile.gpu.linears import HALVES, assert_product, draw
from tests.compile.gpu.modules import make
from tests.serve.hf_models import close

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _a_gpu_in_play(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "DEVICE", "cpu")
    monkeypatch.delenv("SECATEUR_KERNELS", raising=False)
    monkeypatch.delenv("SECATEUR_CROSSOVER", raising=False)


@settings(max_examples=10, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "4:8", "50%", "80%", "50%@8x1"]),
    values=st.sampled_from(["bf16", "fp16", "int8", "int4", "fp8"]),
    name=st.sampled_from(["bf16", "fp16"]),
    rows=st.integers(1, 6),
    groups=st.integers(1, 20),
    shape=st.sampled_from([(), (1,), (2, 3), (0,), (2, 1, 17)]),
    bias=st.booleans(),
)
def test_the_module_computes_the_dense_product(
    pattern: str, values: Any, name: str, rows: int, groups: int, shape: Any, bias: bool
) -> None:
    pieces, weight = draw(pattern, values, 8 * rows, 8 * groups)
    dtype = HALVES.get(values, HALVES[name])
    module = make(pieces, dtype, bias=bias)
    x = torch.randn(*shape, 8 * groups).to(dtype)
    with torch.no_grad():
        y = module(x)
    assert module.weight is None
    assert y.shape == (*shape, 8 * rows)
    assert_product(
        y.reshape(-1, 8 * rows),
        x.reshape(-1, 8 * groups),
        weight,
        None if module.bias is None else module.bias.data,
    )


@pytest.mark.parametrize("tokens", [1, 129])  # by Triton, and by unpacking
def test_both_sides_of_the_crossover(tokens: int) -> None:
    pieces, weight = draw("50%", "int8", 40, 64)
    module = make(pieces, torch.float16, bias=False)
    x = torch.randn(tokens, 64).half()
    with torch.no_grad():
        y = module(x)
        twin = torch.nn.functional.linear(x, weight.half())
    assert torch.equal(y, twin) == (tokens == 129)
    assert torch.allclose(y.float(), twin.float(), atol=0.03)


@pytest.mark.parametrize("alike", [True, False])
def test_merged_linears_as_vllm_has_them(alike: bool) -> None:
    """Gate and up, one below the other: one matrix, or one for each pattern."""
    drawn = [draw(pattern, "int8", 16, 64) for pattern in ("2:4", "2:4" if alike else "50%@8x1")]
    device, biases = torch.device("cpu"), torch.randn(32).bfloat16()
    product = make_product([pieces for pieces, _ in drawn], torch.bfloat16, device)
    assert isinstance(product, Product)
    assert product.how.count("Triton up to") == (1 if alike else 2)
    x = torch.randn(2, 3, 64).bfloat16()
    weight = torch.cat([weight for _, weight in drawn])
    y = product(x, biases)
    assert_product(y.reshape(6, 32), x.reshape(6, 64), weight, biases)
    assert isinstance(make_product([drawn[0][0]], torch.float32, device), str)  # no kernel for it


def test_a_given_crossover_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CROSSOVER", "3")
    pieces, weight = draw("50%", "int8", 40, 64)
    module = make(pieces, torch.float16, bias=False)
    for tokens in (3, 4):
        x = torch.randn(tokens, 64).half()
        with torch.no_grad():
            unpacked = torch.equal(module(x), torch.nn.functional.linear(x, weight.half()))
        assert unpacked == (tokens == 4)


def emulated_cutlass(values: torch.Tensor, meta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``torch._sparse_semi_structured_mm`` from the definition of its layout."""
    assert x.shape[0] == 2 * values.shape[1]
    assert x.shape[1] % 8 == 0
    assert values.shape[0] % 32 == 0
    assert x.shape[0] % 64 == 0
    shape = (values.shape[0], 2 * values.shape[1])
    bits = sm80.Sm80(values.view(torch.uint16).numpy(), meta.numpy(), shape).to_dense()
    return torch.from_numpy(bits).view(values.dtype) @ x


@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (40, 168)])
@pytest.mark.parametrize("tokens", [65, 72])
def test_the_parts_for_cutlass_are_those_of_the_weight(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, tokens: int
) -> None:
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", emulated_cutlass)
    monkeypatch.setattr(machine, "read", lambda _: Machine((8, 0), {"own": "not built"}))
    pieces, weight = draw("2:4", "fp16", rows, columns)
    module = make(pieces, torch.float16)
    x = torch.randn(tokens, columns).half()
    assert "torch's CUTLASS above" in str(kernel_report(module)[0])
    with torch.no_grad():
        y = module(x)
    assert y.is_contiguous()
    wanted = x.float() @ weight.T + module.bias.float()
    assert torch.allclose(y.float(), wanted, atol=0.05, rtol=5e-3)


def test_the_parts_for_cusparselt_are_those_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is opaque: what is checked is what it is given, and what is made of its answer."""

    searches = []

    def search(compressed: Any, x: Any, *_: Any) -> int:
        searches.append(x.shape[1])
        return 7

    def product(compressed: Any, x: Any, bias: Any, transpose_result: bool, **more: Any) -> Any:
        assert transpose_result
        assert more == {"out_dtype": None, "alg_id": 7}
        assert x.shape[1] % 8 == 0
        return torch.nn.functional.linear(x.t(), compressed, bias)

    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(cusparselt, "_LEAST", 48)
    monkeypatch.setattr(cusparselt, "_search", search)
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(machine, "read", lambda _: Machine((9, 0), {"own": "not built"}))
    pieces, weight = draw("2:4", "bf16", 48, 128)
    module = make(pieces, torch.bfloat16)
    x = torch.randn(67, 128).bfloat16()
    with torch.no_grad():
        y = module(x)
    twin = torch.nn.functional.linear(x, weight.bfloat16(), module.bias)
    assert torch.allclose(y.float(), twin.float(), atol=0.1)
    with torch.no_grad():
        module(x.tile(2, 1)[:128])
        module(x.tile(2, 1)[:129])
    assert searches == [72, 136]  # once for each power of two


def product_of_float8(
    compressed: Any, x: Any, out_dtype: Any, transpose_result: bool, **more: Any
) -> Any:
    """``torch._cslt_sparse_mm`` of a weight that was not compressed."""
    assert (compressed.dtype, x.dtype, out_dtype) == (FP8, FP8, torch.float32)
    assert transpose_result
    assert x.shape[1] % 16 == 0
    return x.t().float() @ compressed.float().t()


def scaled_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``torch._scaled_mm``, with what its checks for CUDA ask of shapes, strides and types."""
    assert (x.dtype, weight.dtype, out_dtype) == (FP8, FP8, torch.bfloat16)
    (tokens, columns), rows = x.shape, weight.shape[1]
    assert x.stride() == (columns, 1)
    assert weight.stride() == (1, columns)
    assert columns % 16 == rows % 16 == 0
    assert scale_a.shape == (tokens, 1)
    assert scale_b.shape == (1, rows)
    assert scale_a.dtype == scale_b.dtype == torch.float32
    y = (x.float() @ weight.float()) * scale_a * scale_b
    return (y if bias is None else y + bias).to(out_dtype)


@pytest.mark.parametrize(("pattern", "end"), [("2:4", "cuSPARSELt"), ("50%", "torch._scaled_mm")])
@pytest.mark.parametrize("how", ["rounded", "as they are"])
def test_fp8_with_many_tokens(
    monkeypatch: pytest.MonkeyPatch, pattern: str, end: str, how: str
) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product_of_float8)
    monkeypatch.setattr(cusparselt, "_search", lambda *_: 0)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(machine, "read", lambda _: Machine((9, 0), {"own-fp8": "not built"}))
    if how == "as they are":
        monkeypatch.setenv("SECATEUR_ACTIVATIONS", "fp32")
    pieces, weight = draw(pattern, "fp8", 64, 128)
    module = make(pieces, torch.bfloat16)
    (use,) = kernel_report(module)
    assert (f"{end}" in str(use) and "inputs in fp8" in str(use)) == (how == "rounded")
    x = torch.randn(131, 128).bfloat16()
    x[7] = 0
    with torch.no_grad():
        y = module(x)
    given_ = x.float()
    if how == "rounded":
        scale = given_.abs().amax(dim=1, keepdim=True) / 448
        given_ = (given_ / scale.where(scale > 0, 1)).to(FP8).float() * scale
    wanted = given_ @ weight.T + module.bias.float()
    assert torch.allclose(y.float(), wanted, atol=1e-2, rtol=2**-7)
    few = x[:5]
    with torch.no_grad():
        assert_product(module(few), few, weight, module.bias.data)


def test_a_compiled_module_serves_all_numbers_of_tokens() -> None:
    module = make(draw("2:4", "fp16", 32, 128)[0], torch.float16)
    traced = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 5, 130):
        x = torch.randn(tokens, 128).half()
        with torch.no_grad():
            assert torch.equal(traced(x), module(x))


def test_the_op_keeps_its_promises() -> None:
    pieces, _ = draw("2:4", "fp16", 32, 128)
    module = make(pieces, torch.float16)
    given_ = (torch.randn(2, 3, 128).half(), module._handle, module.bias.detach())
    torch.library.opcheck(torch.ops.secateur.gpu_linear.default, given_)
    with pytest.raises(RuntimeError, match="takes inputs of 128 columns, not 96"):
        module(torch.randn(2, 96).half())
    with pytest.raises(RuntimeError, match=r"takes torch\.float16 here, not torch\.float32"):
        module(torch.randn(2, 128))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_casts(how: Any) -> None:
    pieces, weight = draw("2:4", "int4", 32, 128)
    module = make(pieces, torch.bfloat16, bias=False)
    again = how(module)
    assert again._handle not in (0, module._handle)
    handle = again._handle
    again.to(torch.float16)
    assert again._handle != handle  # the plan names a type
    x = torch.randn(3, 128).half()
    with torch.no_grad():
        assert_product(again(x), x, weight)
    again.float()
    assert again.obstacle == "the kernels take bf16 and fp16, not fp32"
    with torch.no_grad():
        assert torch.equal(again(x.float()), torch.nn.functional.linear(x.float(), weight))


def test_gradients_reach_the_inputs() -> None:
    pieces, weight = draw("2:4", "bf16", 32, 64)
    module = make(pieces, torch.bfloat16)
    x = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.float(), weight.sum(0).expand_as(x), atol=0.1)


def test_the_report_says_which_kernel_runs_when(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [make(draw("2:4", "bf16", 32, 128)[0], torch.bfloat16) for _ in range(2)]
    members.append(make(draw("10%", "fp16", 32, 128)[0], torch.float16))
    report = kernel_report(torch.nn.Sequential(*members))
    assert [str(use) for use in report] == [
        "2 packed linears: 2:4 bf16 32x128, 0.0 MB: Triton up to 64 tokens, cuBLAS on the weight "
        "unpacked for each call above (built-in crossover): no secateur's CUTLASS: this is no GPU; "
        "no torch's CUTLASS: this is no GPU; no cuSPARSELt: this is no GPU",
        "1 packed linear: dense copy in torch, float16, 0.0 MB: the packed form takes 96 % of the "
        "dense bytes",
    ]
    assert report[0].nbytes == 0  # all of it is the stored form
    monkeypatch.setenv("SECATEUR_KERNELS", "off")
    members[0].prepare()
    assert members[0].obstacle == "SECATEUR_KERNELS=off"


def test_a_model_computes_with_them(made: Any) -> None:
    pruned, packed = made["qwen2"]
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float16)
    dense = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float16)
    assert sum(use.linears for use in kernel_report(model)) == 14
    assert {use.path for use in kernel_report(model)} == {"gpu"}
    assert close(model, dense)
    model.to(torch.float32)
    assert {use.path for use in kernel_report(model)} == {"dense"}
    assert close(model, dense.float())


@pytest.mark.parametrize(
    ("pattern", "values", "rows", "columns", "shared"),
    [
        ("2:4", "bf16", 64, 256, True),
        ("2:4", "bf16", 40, 256, False),
        ("2:4", "fp16", 64, 168, False),
        ("50%", "bf16", 64, 256, False),
        ("2:4", "int8", 128, 256, False),
        ("2:4", "fp8", 64, 256, True),
    ],
)
def test_stored_two_four_is_read_as_it_lies(
    pattern: str, values: Any, rows: int, columns: int, shared: bool
) -> None:
    pieces, weight = draw(pattern, values, rows, columns)
    module = make(pieces, HALVES.get(values, torch.bfloat16), bias=False)
    matrix = module.matrix
    assert isinstance(matrix, held.GpuMatrix)
    assert (matrix.blocks.values.data_ptr() == module.weight_values.data_ptr()) == shared
    assert (matrix.nbytes == (4 * rows if values == "fp8" else 0)) == shared  # beside scales
    x = torch.randn(2, columns).to(module.dtype)
    with torch.no_grad():
        assert_product(module(x), x, weight)
