"""Which layout a weight gets and why, and what the packer refuses."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile import cpu
from secateur.errors import EnvironmentFault, ModelError, SecateurError, UsageError
from secateur.pattern import Pattern
from tests.compile.cpu_reference import TYPES, Array, Weight, draw_mask, error, make_weight

NO_GAIN = r"with {} values, dense is faster than {} \(\d+ % kept\)"


def weight(pattern: str = "2:4", value_type: cpu.Values = "bf16", **more: Any) -> Weight:
    return make_weight(np.random.default_rng(0), (32, 160), pattern, value_type, **more)


@pytest.mark.parametrize(
    ("pattern", "value_type", "layout"),
    [
        ("dense", "int4", "dense"),
        ("2:4", "fp32", "2:4"),
        ("2:4", "int4", "2:4"),
        ("4:16", "int4", "4:16"),
        ("1:4", "bf16", "4:16"),
        ("1:8", "int8", "4:16"),
        ("3:16", "int8", "4:16"),
        ("4:8", "int8", "8:16"),
        ("5:16", "fp16", "8:16"),
        ("1:2", "fp32", "8:16"),
        ("1:2@8x1", "fp32", "8x1"),
        ("75%@4x1", "int8", "4x1"),
        ("60%@8x1", "bf16", "8x1"),
        ("1:4@16x1", "int4", "16x1"),
        ("50%", "fp32", "bitmask"),
        ("80%", "fp16", "bitmask"),
        ("80%", "int8", "4:16+rest"),
        ("90%", "int4", "4:16+rest"),
        ("2:5", "bf16", "bitmask"),
    ],
)
def test_the_layout_of_a_pattern(pattern: str, value_type: cpu.Values, layout: str) -> None:
    matrix = weight(pattern, value_type).pack()
    assert (matrix.layout, matrix.value_type, matrix.why) == (layout, value_type, None)
    assert (matrix.rows, matrix.columns) == (32, 160)
    assert matrix.activations == ("int8" if value_type.startswith("int") else "fp32")
    dense = weight(pattern, value_type).pack(layout="dense")
    assert matrix.nbytes <= dense.nbytes * 1.05
    assert repr(matrix) == f"CpuMatrix(32x160, {layout}, {value_type}, {matrix.nbytes} bytes)"


@pytest.mark.parametrize(
    ("pattern", "value_type"),
    [("50%", "int8"), ("75%", "int4"), ("30%", "fp32"), ("3:4", "bf16"), ("5%@4x1", "fp16")],
)
def test_why_a_sparse_weight_is_dense(pattern: str, value_type: cpu.Values) -> None:
    matrix = weight(pattern, value_type).pack()
    assert matrix.layout == "dense"
    assert np.array_equal(matrix.decode(), weight(pattern, value_type).dense)
    assert re.fullmatch(NO_GAIN.format(value_type, pattern), matrix.why or "")


def test_too_many_columns_for_what_is_left_over() -> None:
    rng = np.random.default_rng(1)
    wide = make_weight(rng, (3, 65537), "90%", "int8")
    matrix = wide.pack()
    assert matrix.layout == "dense"
    assert matrix.why == "65537 columns are too many for an unstructured layout"
    with pytest.raises(ModelError, match="3x65537 cannot be packed: more than 65536 columns"):
        wide.pack(layout="4:16+rest")
    widest = make_weight(rng, (3, 65536), "90%", "int8")
    matrix = widest.pack()
    x = rng.standard_normal((2, 65536), np.float32)
    assert matrix.layout == "4:16+rest"
    assert error(matrix.matmul(x), widest, matrix, x) < 3e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": np.zeros(32 * 80 - 1, np.uint16)}, "5118 bytes of values, not 5120"),
        ({"values": np.zeros(32 * 80 + 1, np.uint16)}, "5122 bytes of values, not 5120"),
        ({"bitmask": np.full((32, 19), 0x55, np.uint8)}, "5120 bytes of values, not 4864"),
        ({"bitmask": np.full((32, 20), 0xFF, np.uint8)}, "5120 bytes of values, not 10240"),
        ({"bitmask": np.tile(np.uint8([0x7F, 0x01]), (32, 10))}, "the mask is not of this N:M"),
        ({"bitmask": None}, "5120 bytes of values, not 10240"),
        ({"shape": (31, 160)}, "640 bytes of mask, not 620"),
        ({"shape": (32, 158)}, "a bit past the last column is set in row 0"),
        ({"shape": (32, 161)}, "640 bytes of mask, not 672"),
        ({"shape": (0, 160)}, "impossible shape"),
        ({"shape": (32, -160)}, "impossible shape"),
        ({"shape": (1 << 40, 160)}, "impossible shape"),
    ],
)
def test_parts_that_contradict_each_other(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=f"cannot be packed: .*({said})") as refused:
        replace(weight(), **change).pack()
    assert "secateur compile" in refused.value.fix


def test_a_mask_without_bits_is_a_dense_weight_only() -> None:
    full = weight("dense")
    with pytest.raises(ModelError, match="impossible shape"):  # 2^67 bits of values: 0 in 64 bits
        replace(full, shape=(1 << 31, 1 << 31), values=np.zeros(0, np.uint16)).pack()
    for pattern, layout in [("2:4", None), ("4:16", None), ("50%", "bitmask")]:
        with pytest.raises(ModelError, match="a sparse layout needs a mask"):
            replace(full, pattern=weight(pattern).pattern).pack(layout=layout)


@pytest.mark.parametrize("pattern", ["50%@8x1", "2:4@16x1"])
def test_rows_that_are_no_blocks(pattern: str) -> None:
    with pytest.raises(ModelError, match="impossible shape"):
        replace(weight(pattern), shape=(30, 160)).pack()


@pytest.mark.parametrize("layout", [None, "dense"])
@pytest.mark.parametrize("pattern", ["dense", "2:4", "50%@4x1", "90%"])
def test_values_below_the_limits(pattern: str, layout: str | None) -> None:
    """-128 and -8 would overflow in the kernels' sums of products."""
    for value_type, said in (("int8", "an int8 value is -128"), ("int4", "an int4 value is -8")):
        sound = weight(pattern, value_type)  # type: ignore[arg-type]
        for place in (0, len(sound.values) // 2, len(sound.values) - 1):
            values = sound.values.copy()
            values[place] = -128 if value_type == "int8" else values[place] & 0xF0 | 8
            with pytest.raises(ModelError, match=said):
                replace(sound, values=values).pack(layout=layout)


@pytest.mark.parametrize("value_type", ["int8", "int4"])
def test_scales_and_groups(value_type: cpu.Values) -> None:
    sound = weight("2:4", value_type)
    scales = sound.scales
    assert scales is not None
    for change, said in [
        ({"scales": None}, "integers without scales"),
        ({"scales": scales[:, :-1]}, r"scales of another shape than \[rows, groups\]"),
        ({"scales": scales[:-1]}, r"scales of another shape than \[rows, groups\]"),
        ({"group_size": 32}, r"scales of another shape than \[rows, groups\]"),
        ({"group_size": 48}, "scales of another shape|groups of 48 columns; 32, 64 or 128"),
        ({"group_size": None}, "groups of 0 columns; 32, 64 or 128 are possible"),
    ]:
        with pytest.raises(ModelError, match=f"cannot be packed: {said}"):
            replace(sound, **change).pack()  # type: ignore[arg-type]


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(UsageError, match="'bitmaks' does not go with 2:4 and bf16") as refused:
        weight().pack(layout="bitmaks")
    assert "did you mean 'bitmask'" in refused.value.fix
    with pytest.raises(UsageError, match="'4:16' does not go with 2:4"):
        weight().pack(layout="4:16")
    with pytest.raises(UsageError, match="activations 'int8' do not go with values bf16"):
        weight().pack(activations="int8")
    with pytest.raises(UsageError, match="activations 'bf16' do not go with values int8"):
        weight(value_type="int8").pack(activations="bf16")
    with pytest.raises(SecateurError, match="no bitmask layout of integers"):
        weight(value_type="int8").pack(layout="bitmask")
    with pytest.raises(UsageError, match="0 threads"):
        cpu.set_threads(0)
    with pytest.raises(UsageError, match="this CPU cannot run 'avx1024'") as refused:
        cpu.use_isa("avx1024")
    assert "plain" in refused.value.fix


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_kernels", None)
    for call in (weight().pack, cpu.threads, cpu.isas):
        with pytest.raises(EnvironmentFault, match="kernels are not built"):
            call()


def test_the_speed_of_memory() -> None:
    assert len(cpu.read_bandwidth(1 << 22, 3)) == 3
    assert all(speed > 0 for speed in cpu.read_bandwidth(1 << 22, 2))


@pytest.mark.parametrize("value_type", TYPES)
def test_windows_that_keep_less_than_two(value_type: cpu.Values) -> None:
    """Rows that mix full windows of 2:4 with others: int4 rows begin within a byte, too."""
    rng = np.random.default_rng(7)
    mask = draw_mask(rng, (24, 196), Pattern.parse("2:4"))
    mask &= (rng.random(mask.shape) < 0.95) | (np.arange(196) % 96 < 64)
    assert 0 < (mask.reshape(24, -1, 4).sum(-1) < 2).mean() < 0.2
    weight = make_weight(rng, mask.shape, "2:4", value_type, 32, mask)
    assert np.array_equal(weight.pack().decode(), weight.dense)


def at_line(stream: Array, room: int = 64) -> Array:
    """The bytes at a multiple of 64, with room behind them that no product may count."""
    memory = np.full(stream.nbytes + room + 64, 255, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + stream.nbytes + room]
    copy[: stream.nbytes] = stream
    return copy


def streams_of(matrix: cpu.CpuMatrix, room: int = 64) -> dict[str, Array]:
    return {
        part: stream.copy() if part.endswith("starts") else at_line(stream, room)
        for part, stream in matrix.streams.items()
    }


LAID = ["dense", "2:4", "4:16", "8:16", "50%@4x1", "50%@8x1", "70%@16x1", "60%", "90%"]


@pytest.mark.parametrize("pattern", LAID)
@pytest.mark.parametrize("value_type", TYPES)
def test_a_matrix_on_memory_that_others_keep(pattern: str, value_type: cpu.Values) -> None:
    packed = weight(pattern, value_type).pack()
    facts = json.loads(json.dumps(packed.facts))
    mapped = cpu.mapped(facts, streams_of(packed))
    gc.collect()  # the arrays are held by the matrix alone
    assert repr(mapped) == repr(packed)
    assert (mapped.why, mapped.activations) == (packed.why, packed.activations)
    assert np.array_equal(mapped.decode(), packed.decode())
    rng = np.random.default_rng(3)
    for tokens in (1, 7, 40):
        x = rng.standard_normal((tokens, 160), np.float32)
        assert np.array_equal(mapped.matmul(x), packed.matmul(x))
        assert mapped.rounds_inputs(tokens) == packed.rounds_inputs(tokens)
    assert np.array_equal(mapped.clone().decode(), packed.decode())
    assert facts == mapped.facts


@pytest.mark.parametrize("part", ["data", "rest_data"])
def test_memory_that_is_not_of_the_layouts_length(part: str) -> None:
    packed = weight("90%", "int8").pack()
    assert packed.layout == "4:16+rest"
    starts = part.replace("data", "starts") if part != "data" else "starts"

    def refused(**change: Array | None) -> None:
        streams = {k: v for k, v in (streams_of(packed) | change).items() if v is not None}
        with pytest.raises(ValueError, match="streams of other lengths than the layout's"):
            cpu.mapped(packed.facts, streams)

    whole, first = streams_of(packed)[part], streams_of(packed)[starts]
    refused(**{part: streams_of(packed, room=56)[part]})
    refused(**{part: whole[32:]})
    refused(**{part: at_line(np.append(whole, whole))[32:]})
    refused(**{starts: first[:-1]})
    refused(**{starts: first[::-1].copy()})
    refused(**{starts: np.append(first[:-1], np.int64(2**62))})
    refused(**{starts: first - 32})
    if part == "rest_data":
        refused(**{part: None})
        refused(**{starts: None})


@given(st.data())
def test_any_changed_byte_changes_the_checksum(data: st.DataObject) -> None:
    words = data.draw(st.integers(1, 70_000))
    body = np.random.default_rng(words).integers(0, 256, 8 * words, np.uint8)
    before = cpu.checksum(body)
    assert cpu.checksum(body.copy()) == before
    body[data.draw(st.integers(0, 8 * words - 1))] ^= data.draw(st.integers(1, 255))
    assert cpu.checksum(body) != before
