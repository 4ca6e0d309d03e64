"""Packed linears: the kernels agree with the dense product, whatever is done to the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from secateur.compile import cpu, torch_ops
from secateur.compile.config import BITMASK, LIMITS, SCALES, VALUES
from secateur.compile.packed import encode, encode_integers
from secateur.compile.quantize import rtn
from secateur.compile.values import DTYPES
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.serve.linear import SparseLinear, kernel_report
from tests.compile.conftest import brute_mask

ROWS, COLUMNS = 48, 96
PATTERNS = ["2:4", "4:8", "50%", "80%", "50%@8x1"]
TOLERANCE = {"fp32": 1e-5, "bf16": 6e-3, "fp16": 8e-4, "int8": 1e-5, "int4": 1e-5}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SECATEUR_KERNELS", raising=False)
    monkeypatch.delenv("SECATEUR_ACTIVATIONS", raising=False)
    with torch.no_grad():
        yield


def make(
    pattern: str = "2:4", values: Any = "fp32", *, bias: bool = True, **options: Any
) -> SparseLinear:
    """A prepared module with random weights; integers in an fp32 model."""
    torch.manual_seed(0)
    chosen = Pattern.parse(pattern)
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    if not chosen.is_dense:
        mask = brute_mask(ROWS, COLUMNS, chosen)
    weight = torch.randn(ROWS, COLUMNS)
    dtype = DTYPES.get(values, torch.float32)
    if values in LIMITS:
        layer, tensors = encode_integers(
            rtn(weight, mask, LIMITS[values], 32), mask, chosen, values
        )
        options |= {"value_type": values, "group_size": 32}
    else:
        layer, bits, kept = encode(weight.to(dtype), mask, chosen)
        tensors = {BITMASK: bits, VALUES: kept}
    module = SparseLinear("layer", layer, bias, dtype, **options)
    module.weight_values.data = tensors[VALUES]
    if module.weight_bitmask is not None:
        module.weight_bitmask = tensors[BITMASK]
    if values in LIMITS:
        module.weight_scales = tensors[SCALES]
    if module.bias is not None:
        module.bias.data.normal_()
    module.prepare()
    return module


def product(module: SparseLinear, x: torch.Tensor) -> torch.Tensor:
    """What the module should say, in fp32."""
    bias = None if module.bias is None else module.bias.float()
    return linear(x.float(), module.dense().float(), bias)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def agree(module: SparseLinear, tolerance: float = 1e-5, shape: tuple[int, ...] = (3,)) -> bool:
    x = torch.randn(*shape, COLUMNS, dtype=module.dtype)
    return apart(module(x), product(module, x)) < tolerance


@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        *((pattern, values) for pattern in PATTERNS for values in TOLERANCE),
        *(("dense", values) for values in ("int8", "int4")),
    ],
)
def test_the_kernels_agree_with_the_dense_product(pattern: str, values: str) -> None:
    rounded = make(pattern, values)
    module = make(pattern, values, activations="fp32") if values in LIMITS else rounded
    limit = TOLERANCE[values]
    if pattern == "80%" and values in LIMITS:  # what the layout leaves over is fp16
        limit = 1e-4
    assert module.weight is None
    assert rounded.matrix is not None
    for tokens in (*range(1, 41), 130):
        rounds = rounded.matrix.rounds_inputs(tokens)
        x = torch.randn(tokens, COLUMNS, dtype=module.dtype)
        found, wanted = module(x), product(module, x)
        assert found.dtype == x.dtype
        assert apart(found, wanted) < limit, tokens
        loss = apart(rounded(x), wanted)  # that of int8 activations
        assert loss < (0.03 if rounds else limit), tokens
        if values in LIMITS:
            assert (loss > 1e-4) == rounds, tokens


def test_shapes_biases_and_strides() -> None:
    module, plain = make(), make(bias=False)
    for shape in [(), (1,), (2, 3), (2, 1, 20), (0,), (2, 0)]:
        x = torch.randn(*shape, COLUMNS)
        for one in (module, plain):
            assert torch.allclose(one(x), product(one, x), atol=1e-4)
    across = torch.randn(COLUMNS, 5).T
    assert not across.is_contiguous()
    assert apart(module(across), product(module, across)) < 1e-5
    with torch.inference_mode():
        assert agree(module)
    with pytest.raises(RuntimeError, match="takes inputs of 96 columns, not 95"):
        module(torch.randn(2, 95))


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
def test_the_dense_weight_is_gone(values: Any) -> None:
    module = make("2:4", values, bias=False)
    module(torch.randn(3, COLUMNS, dtype=module.dtype))
    held = [*module.parameters(), *module.buffers()]
    assert all(tensor.numel() < ROWS * COLUMNS for tensor in held)
    assert set(module.state_dict()) <= {"weight_bitmask", "weight_values", "weight_scales"}
    assert module.matrix is not None
    stored = sum(tensor.nbytes for tensor in held)
    assert 0.9 * stored < module.matrix.nbytes < 1.25 * stored


@pytest.mark.parametrize(("narrow", "kept"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32")])
def test_widened_values_are_read_as_the_narrow_ones_they_are(narrow: Any, kept: str) -> None:
    module = make("2:4", narrow).float()
    assert module.weight_values.dtype == torch.float32
    assert module.matrix is not None
    assert module.matrix.value_type == kept
    assert agree(module)


def test_casting_packs_again() -> None:
    module = make("2:4", "fp32")
    module.to(torch.bfloat16)
    assert module.matrix is not None
    assert (module.matrix.value_type, module.dtype) == ("bf16", torch.bfloat16)
    assert agree(module, 6e-3)
    module.to("cpu").float()
    assert agree(module)
    before = module.matrix
    assert module.float().cpu().matrix is before  # nothing changed, nothing was packed
    module.double()
    assert (module.matrix, module.obstacle) == (None, "there are no kernels for float64")
    assert agree(module, 1e-6)
    module.float()
    assert module.weight is None
    assert agree(module)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_casting_leaves_integers_as_they_are(values: Any) -> None:
    module = make("2:4", values)
    before = module.matrix
    module.to(torch.bfloat16)
    assert (module.matrix, module.dtype) == (before, torch.bfloat16)
    assert agree(module, 0.03)
    module.double()
    assert module.weight is not None
    assert module.weight.dtype == torch.float64
    assert agree(module, 1e-6)
    module.half()
    assert module.weight is None
    assert agree(module, 0.03)


def test_to_meta_and_back() -> None:
    module = make()
    state = copy.deepcopy(module.state_dict())
    module.to("meta")
    assert (module.matrix, module.weight) == (None, None)
    module.to_empty(device="cpu").load_state_dict(state)
    assert agree(module)


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(
    monkeypatch: pytest.MonkeyPatch, how: Any, kernels: str
) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", kernels)
    module = make("50%", "int8")
    again = how(module)
    x = torch.randn(4, COLUMNS)
    wanted = module(x)
    assert torch.equal(again(x), wanted)
    if kernels == "on":
        assert again._handle != module._handle
    again.weight_values.data = -again.weight_values
    assert torch.equal(module(x), wanted)
    assert agree(again, 0.03)


def test_new_values_are_noticed() -> None:
    module = make()
    other = copy.deepcopy(module.state_dict())
    other["weight_values"] *= 3
    module.load_state_dict(other)  # in place
    assert agree(module)
    other["weight_values"] = other["weight_values"] + 1
    module.load_state_dict(other, assign=True)
    assert agree(module)
    module.weight_values = torch.nn.Parameter(-module.weight_values, requires_grad=False)
    assert agree(module)
    module.weight_values.data = module.weight_values + 2
    assert agree(module)
    module.weight_values.zero_()  # the one way that is not
    module.prepare()
    x = torch.randn(2, COLUMNS)
    assert module.bias is not None
    assert torch.equal(module(x), module.bias.expand(2, ROWS))


def test_a_compiled_module_follows_its_changes() -> None:
    module = make()
    traced = torch.compile(module, backend="eager", fullgraph=True)
    state = copy.deepcopy(module.state_dict())
    state["weight_values"] *= -2

    def agrees() -> bool:
        x = torch.randn(3, COLUMNS, dtype=module.dtype)
        return apart(traced(x), product(module, x)) < (1e-5 if x.dtype == torch.float32 else 6e-3)

    assert agrees()
    module.load_state_dict(state)
    assert agrees()
    module.to(torch.bfloat16)
    assert agrees()
    module.double()
    assert agrees()


def test_damage_is_found_before_the_kernels_see_it() -> None:
    module = make("2:4", "int8")
    assert module.weight_scales is not None
    module.weight_scales[1, 1] = float("nan")
    with pytest.raises(ModelError, match="row 1, group 1"):
        module.prepare()


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_gradients_reach_the_inputs(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setenv("SECATEUR_KERNELS", kernels)
    for values in ("fp32", "bf16", "int8"):
        module = make("2:4", values)
        with torch.enable_grad():
            x = torch.randn(2, 3, COLUMNS, dtype=module.dtype, requires_grad=True)
            module(x).float().square().sum().backward()
            y = x.detach().float().requires_grad_()
            product(module, y).square().sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert apart(x.grad, y.grad) < 0.03


def test_int8_activations_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not agree(make("2:4", "int4"))
    assert agree(make("2:4", "int4", activations="fp32"))
    monkeypatch.setenv("SECATEUR_ACTIVATIONS", "fp32")
    assert agree(make("2:4", "int4"))
    assert agree(make("2:4", "fp32"))
    assert not agree(make("2:4", "int4", activations="int8"))  # what was asked for in code


@pytest.mark.parametrize("name", ["SECATEUR_KERNELS", "SECATEUR_ACTIVATIONS"])
def test_settings_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "offf")
    with pytest.raises(UsageError, match=f"{name}='offf'"):
        make("2:4", "int8")


def test_why_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "BUILT", False)
    unbuilt = make()
    assert unbuilt.obstacle == "the native module is not built"
    assert agree(unbuilt)
    monkeypatch.undo()
    monkeypatch.setenv("SECATEUR_KERNELS", "off")
    off = make("2:4", "bf16")
    assert off.obstacle == "SECATEUR_KERNELS=off"
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(off(x), linear(x, off.dense(), off.bias))


def test_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [make(), make(), make("10%", "bf16"), make("50%@8x1", "int8")]
    monkeypatch.setenv("SECATEUR_KERNELS", "off")
    members.append(make())
    report = kernel_report(torch.nn.Sequential(*members, torch.nn.Linear(4, 4)))
    assert [(use.linears, use.path, use.layout, use.values) for use in report] == [
        (2, "kernels", "2:4", "fp32"),
        (1, "kernels", "dense", "bf16"),
        (1, "kernels", "8x1", "int8"),
        (1, "dense", "dense", "float32"),
    ]
    assert report[0].nbytes == 2 * members[0].matrix.nbytes
    assert report[1].why is not None
    assert "dense is faster than 10%" in report[1].why
    threads = f"{cpu.isa()}, {cpu.threads()} threads"
    assert str(report[0]).startswith(f"2 packed linears: CPU kernels ({threads}), layout 2:4, fp32")
    assert "int8 values x int8 activations" in str(report[2])
    assert str(report[3]) == (
        "1 packed linear: dense copy in torch, float32, 0.0 MB: SECATEUR_KERNELS=off"
    )
    assert kernel_report(torch.nn.Linear(4, 4)) == []
