"""fp8 values: the numbers, rounding to them, the packed form, and what a CPU makes of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.artifact import Manifest
from secateur.compile import (
    cpu,
    e4m3,
    pack_model,
    read_packed,
    write_compressed_tensors,
    write_dense,
)
from secateur.compile.nearest import widen_fp8
from secateur.compile.quantize import (
    Quantised,
    activation_error,
    gptq,
    round_tokens,
    rtn,
    scale_above,
)
from secateur.compile.shard import cut, dense, join
from secateur.errors import ModelError
from secateur.gram import damped
from secateur.pattern import Pattern
from secateur.recipe import Calibration
from tests.compile.conftest import brute_mask, prune_by_hand, rewrite
from tests.compile.gpu.linears import draw
from tests.compile.orphans import write_orphan

LAYER = "model.layers.1.mlp.down_proj"
VALUES, SCALES = f"{LAYER}.weight_values", f"{LAYER}.weight_scales"
POSITIVE = [float(number) for number in e4m3.NUMBERS[:127]]


def nearest(value: float) -> float:
    """The number of e4m3fn nearest to a value, by looking at all; of two the even one."""
    sized = min(range(127), key=lambda i: (abs(POSITIVE[i] - abs(value)), i % 2))
    return math.copysign(POSITIVE[sized], value)


def test_every_byte_is_torchs_number() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    wanted = bytes_.view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3.NUMBERS, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(e4m3.NUMBERS), bytes_.numpy() > 127)
    assert np.array_equal(e4m3.is_nan(bytes_.numpy()), np.isnan(wanted))
    assert POSITIVE[-1] == e4m3.LARGEST
    assert np.isfinite(np.float32(e4m3.LARGEST) * np.float32(e4m3.LARGEST_SCALE))
    assert 2 * e4m3.LARGEST_SCALE * POSITIVE[-1] > float(np.finfo(np.float32).max)


@settings(max_examples=200, deadline=None)
@given(largest=st.floats(0, float(np.finfo(np.float32).max), width=32))
def test_scales_are_the_smallest_powers_of_two(largest: float) -> None:
    given_ = torch.tensor([largest])
    if largest > e4m3.LARGEST * e4m3.LARGEST_SCALE:
        with pytest.raises(ModelError, match="too large for fp8"):
            scale_above(given_, 448)
        return
    scale = float(scale_above(given_, 448))
    assert scale * 448 >= largest
    if not largest:
        assert scale == 0
        return
    assert math.frexp(scale)[0] == 0.5
    assert scale * 224 < largest or scale == 2.0**-126


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rtn_finds_the_nearest_number(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    size = data.draw(st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
    weight = torch.randn(rows, columns) * torch.logspace(-4, 0, columns) * size
    mask = torch.rand(rows, columns) < 0.6
    found = rtn(weight, mask, 448, columns)
    assert found.values.dtype == torch.float8_e4m3fn
    assert (found.scales.dtype, found.scales.shape) == (torch.float32, (rows, 1))
    for row in range(rows):
        scale = float(found.scales[row, 0])
        for column in range(columns):
            kept = bool(mask[row, column])
            wanted = nearest(float(weight[row, column]) / scale) if kept and scale else 0.0
            assert float(found.values[row, column].float()) == wanted
            exact = wanted * scale
            assert float(found.dense()[row, column]) == exact
            assert float(found.dense()[row, column].bfloat16()) == exact


def test_gptq_is_the_papers_elimination() -> None:
    """As of the test of the same name for integers: no Cholesky factor, fp64."""
    torch.manual_seed(3)
    rows, columns = 3, 140
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns)
    inputs = torch.randn(400, columns) @ mix
    weight, mask = torch.randn(rows, columns), brute_mask(rows, columns, Pattern.parse("2:4"))
    gram = inputs.t() @ inputs
    found = gptq(weight, mask, gram, 448, columns)
    inverse = torch.linalg.inv(damped(gram, 0.01).double()).numpy()
    left = (weight * mask).double().numpy()
    scales = found.scales[:, 0].tolist()
    assert torch.equal(found.scales, rtn(weight, mask, 448, columns).scales)
    wanted = np.zeros((rows, columns))
    for j in range(columns):
        for row in range(rows):
            if mask[row, j]:
                clipped = max(-448.0, min(448.0, left[row, j] / scales[row]))
                wanted[row, j] = nearest(clipped)
                error = (left[row, j] - wanted[row, j] * scales[row]) / inverse[j, j]
                left[row, j + 1 :] -= error * inverse[j, j + 1 :] * mask[row, j + 1 :].numpy()
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    same = torch.from_numpy(wanted).float() == found.values.float()
    assert float(same.float().mean()) > 0.99  # fp32 sums may tip a value between two numbers
    plain = rtn(weight, mask, 448, columns).dense()

    def lost(other: torch.Tensor) -> float:
        return float((inputs @ (weight * mask - other).t()).square().sum())

    assert lost(found.dense()) < lost(plain)
    assert not found.values.float()[~mask].any()


def test_tokens_are_rounded_with_a_scale_each() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 30) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    values, scales = round_tokens(x)
    for token in range(5):
        scale = float(x[token].abs().max() / 448) or 1.0
        assert float(scales[token]) == pytest.approx(scale)
        for column in range(30):
            own = float(x[token, column] / scales[token])
            assert float(values[token, column].float()) == nearest(max(-448.0, min(448.0, own)))
    weight = torch.randn(7, 30)
    error = (x - values.float() * scales) @ weight.t()
    wanted = float(error.norm() / (x @ weight.t()).norm())
    assert activation_error(weight, x, None) == pytest.approx(wanted, rel=1e-3)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unequal rows, blocks of rows and a dense linear: 21 columns of down_proj."""
    folder = tmp_path_factory.mktemp("fp8")
    return prune_by_hand(folder / "pruned", "50%@4x1", hidden=24, inner=36, dense=("k_proj",))


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    pack_model(pruned, pruned.parent / "packed", values="fp8", quantize="rtn")
    return pruned.parent / "packed"


def test_the_packed_form(pruned: Path, packed: Path) -> None:
    stored, before = (load_file(folder / "model.safetensors") for folder in (packed, pruned))
    model = read_packed(packed)
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (quantization["format_version"], quantization["values"]) == (3, "fp8")
    assert "group_size" not in quantization
    assert len(model.layers) == 14
    for name, layer in model.layers.items():
        values, scales = stored[f"{name}.weight_values"], stored[f"{name}.weight_scales"]
        assert (values.dtype, values.shape) == (torch.uint8, layer.values_shape)
        assert (scales.dtype, scales.shape) == (torch.float32, (layer.shape[0], 1))
        mask, kept = model.mask(name), iter(values.reshape(-1).tolist())
        weight, old = model.load(f"{name}.weight"), before[f"{name}.weight"]
        for row, column in mask.nonzero().tolist():
            number = float(e4m3.NUMBERS[next(kept)])
            assert float(weight[row, column]) == number * float(scales[row, 0])
            assert number == nearest(float(old[row, column]) / float(scales[row, 0]))
        assert not weight[~mask].any()
        facts = Manifest.read(packed).layers[name].steps["quantize"]
        assert (facts["method"], facts["relative_error"]) == ("rtn", None)


def test_gptq_goes_the_whole_way(pruned: Path, packed: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(3, 64, (4, 32))}, ids)
    text = Calibration(data=str(ids))
    report = pack_model(pruned, tmp_path / "out", values="fp8", calibration=text, quiet=True)
    assert (report.values, report.group_size, report.quantize) == ("fp8", None, "gptq")
    recipe = Manifest.read(tmp_path / "out").recipe["compile"]
    assert "group_size" not in recipe
    for layer in report.layers.values():
        assert layer.quantization_error is not None
        assert 0 < layer.quantization_error < 0.003
        assert layer.activation_error is not None
        assert 0.005 < layer.activation_error < 0.05
    write_dense(tmp_path / "out", tmp_path / "dense", values="bf16")
    read, model = load_file(tmp_path / "dense" / "model.safetensors"), read_packed(tmp_path / "out")
    for name in model.layers:
        assert torch.equal(read[f"{name}.weight"].float(), model.load(f"{name}.weight"))


def edit(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def put(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("tensor", "change", "said"),
    [
        (VALUES, put(7, 0x7F), "value 7 is NaN"),
        (VALUES, put(9, 0xFF), "value 9 is NaN"),
        (VALUES, lambda v: v.view(torch.int8), "type I8, not U8"),
        (VALUES, lambda v: v.view(torch.float8_e4m3fn), "type F8_E4M3, not U8"),
        (SCALES, lambda s: s.half(), "type F16, not F32"),
        (SCALES, lambda s: s[:, 0], r"shape \(24,\), not \(24, 1\)"),
        (SCALES, put(2, -1.0), "row 2, group 0 is -1: negative"),
        (SCALES, put(3, math.nan), "row 3, group 0 is nan"),
        (SCALES, put(4, 2.0**120), r"the scale of row 4 is above 2\^119"),
    ],
)
def test_damaged_tensors(
    packed: Path, tmp_path: Path, tensor: str, change: Callable[..., Any], said: str
) -> None:
    directory = Path(shutil.copytree(packed, tmp_path / "copy"))
    rewrite(directory, edit(tensor, change), "model.safetensors")
    for read in (
        lambda: read_packed(directory).load(f"{LAYER}.weight"),
        lambda: read_packed(directory).pieces(LAYER),
    ):
        with pytest.raises(ModelError, match=said) as refused:
            read()
        assert tensor in refused.value.what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "version 2 has int8 or int4, not fp8"),
        ({"values": "int8"}, "version 3 has fp8, not int8"),
        ({"group_size": 64}, "floating-point values have no groups"),
    ],
)
def test_other_configs(packed: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = Path(shutil.copytree(packed, tmp_path / "copy")) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        read_packed(path.parent)


def test_a_nan_or_huge_weight_is_refused(pruned: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "copy"))
    kept = int((load_file(directory / "model.safetensors")[f"{LAYER}.weight"] != 0).nonzero()[0, 1])
    for value, said in ((math.nan, "holds NaN"), (3.4e38, "too large for fp8")):
        rewrite(directory, edit(f"{LAYER}.weight", put(kept, value)), "model.safetensors")
        with pytest.raises(ModelError, match=said) as refused:
            pack_model(directory, tmp_path / "out", values="fp8", quantize="rtn")
        assert LAYER in refused.value.what


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "90%", "50%@16x1", "dense"])
def test_a_cpu_multiplies_exactly_these_weights(pattern: str) -> None:
    pieces, weight = draw(pattern, "fp8", 48, 64)
    shape = pieces.layer.shape
    matrix = cpu.pack(
        pieces.values, pieces.bitmask, shape, pieces.layer.pattern, "fp8", scales=pieces.scales
    )
    assert (matrix.value_type, matrix.activations) == ("bf16", "fp32")
    assert matrix.why == "fp8 values times the scales of their rows, exactly"
    assert np.array_equal(matrix.decode(), weight.numpy())
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    assert np.allclose(matrix.matmul(x), x @ weight.numpy().T, rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999),
    exponent=st.integers(-100, 100),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
def test_other_scales_are_rounded_once_and_told(
    seed: int, exponent: int, counts: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(8, 127, sum(counts), dtype=np.uint8)  # normal numbers
    scales = np.ldexp(rng.uniform(1, 2, (len(counts), 1)), exponent).astype(np.float32)
    found, kind, made = widen_fp8(values, np.array(counts), scales)
    wide = np.repeat(scales[:, 0].astype(np.float64), counts)
    exact = e4m3.NUMBERS[values].astype(np.float64) * wide
    if kind == "bf16":
        own = (found.astype(np.uint32) << 16).view(np.float32)
    else:
        own = found.view(np.float16) if kind == "fp16" else found
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
        rounded = rounded.astype(np.float16) if kind == "fp16" else rounded
    assert np.array_equal(own.astype(np.float64), rounded.astype(np.float64))
    assert np.array_equal(own, exact.astype(np.float32)) or not made.endswith("exactly")
    assert made.endswith(("exactly", f"rounded once, to {kind}"))
    assert np.linalg.norm(own - exact) <= 2**-10.9 * np.linalg.norm(exact)


@pytest.mark.parametrize("pattern", ["2:4", "50%@4x1", "dense"])
def test_shares_of_a_linear(pattern: str) -> None:
    pieces, weight = draw(pattern, "fp8", 24, 48)
    whole = weight.numpy()
    assert np.array_equal(dense(pieces), whole)
    for rows, columns in ((range(4, 20), range(48)), (range(24), range(12, 36))):
        part = cut(pieces, rows, columns)
        assert np.array_equal(dense(part), whole[rows.start : rows.stop, columns])
    halves = [cut(pieces, range(start, start + 12), range(48)) for start in (0, 12)]
    assert np.array_equal(dense(join(halves)), whole)


@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_orphans_keep_their_bytes(tmp_path: Path, scales: Any) -> None:
    """Orphan to packed to orphan: the same values and scales, and no scale is a power of two."""
    orphan = write_orphan(tmp_path, "24-fp8")
    if scales == "tensor":
        orphan = tmp_path / "tensor"
        write_compressed_tensors(tmp_path / "24-fp8.pruned", orphan, values="fp8", scales="tensor")
        (orphan / "manifest.json").unlink()
    report = pack_model(orphan, tmp_path / "packed")
    assert (report.values, report.quantize) == ("fp8", "kept")
    assert not any("rounded" in note or "became" in note for note in report.notes)
    before: dict[str, torch.Tensor] = {}
    for file in orphan.glob("*.safetensors"):
        before |= load_file(file)
    model = read_packed(tmp_path / "packed")
    for name, layer in model.layers.items():
        whole = before.get(f"{name}.compressed", before.get(f"{name}.weight"))
        assert whole is not None
        pieces = model.pieces(name)
        assert np.array_equal(pieces.values.reshape(-1), whole.view(torch.uint8).numpy().ravel())
        scale = before[f"{name}.weight_scale"].float().expand(layer.shape[0], 1)
        assert pieces.scales is not None
        assert np.array_equal(pieces.scales, scale.numpy())
        assert (np.frexp(pieces.scales)[0] != 0.5).any()
    back = write_compressed_tensors(tmp_path / "packed", tmp_path / "back", values="fp8")
    assert back.quantize == "kept"
    after: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        other = before[name]
        if name.endswith("weight_scale") and scales == "tensor":
            other = other.expand(tensor.shape)
        assert torch.equal(tensor.view(torch.uint8), other.contiguous().view(torch.uint8)), name


def test_values_of_no_scale_stay_zero() -> None:
    found = Quantised(torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.tensor([[0.0], [1.0]]), 4)
    assert not found.dense().any()
    assert torch.equal(
        rtn(torch.zeros(2, 4), torch.ones(2, 4).bool(), 448, 4).scales, torch.zeros(2, 1)
    )
