"""marlin-24 by its definition, position by position; tests/peers has the library's own packer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from secateur.compile import marlin24
from secateur.errors import ModelError

Array = np.ndarray[Any, Any]


def two_of_four(rows: int, columns: int, bits: int, seed: int = 0) -> Array:
    """Integers of the whole range; some groups keep fewer than two."""
    draw = np.random.default_rng(seed)
    values = draw.integers(-(1 << bits - 1), 1 << bits - 1, (rows, columns)).astype(np.int8)
    order = draw.random((rows, columns // 4, 4)).argsort(axis=2)
    values.reshape(rows, -1, 4)[order < 2] = 0
    return values


def some_scales(rows: int, groups: int) -> Array:
    return np.arange(1, rows * groups + 1, dtype=np.float16).reshape(rows, groups) / np.float16(64)


SHAPES = [(64, 32), (128, 128), (64, 256), (192, 384), (256, 512)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gptq", [False, True])
def test_round_trip(bits: int, shape: tuple[int, int], gptq: bool) -> None:
    values = two_of_four(*shape, bits)
    for groups in {1, max(1, shape[1] // 128)}:
        scales = some_scales(shape[0], groups)
        packed = marlin24.pack(values, scales, bits, gptq=gptq)
        assert packed.weight.shape == (shape[1] // 32, 16 * shape[0] * bits // 32)
        assert packed.meta.shape == (shape[1] // 32, 2 * shape[0])
        again, own, found = marlin24.unpack(packed, gptq=gptq)
        assert found == bits
        assert np.array_equal(again, values)
        assert np.array_equal(own, scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_where_each_value_lies(bits: int) -> None:
    """The kernel's order, from its lanes: as the 2:4 operands of mma.m16n8k32 are loaded."""
    rows, columns = 64, 64
    values = two_of_four(rows, columns, bits)
    packed = marlin24.pack(values, some_scales(rows, 1), bits)
    per_word = 32 // bits
    words = packed.weight.view(np.uint32).reshape(-1)
    flat = [int(word) >> bits * i & (1 << bits) - 1 for word in words for i in range(per_word)]
    kept = kept_values(values)  # [rows, columns / 2], as the metadata says
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    for place, stored in enumerate(flat):
        block, inside = divmod(place, 1024)  # four tiles of 16 x 16
        inside = inside // per_word * per_word + interleaved[inside % per_word]
        lane, rest = divmod(inside, 32)
        j, which = divmod(rest, 8)
        half, step = divmod(which, 4)
        k = 2 * (lane % 4) + (0, 1, 8, 9)[step]
        column = lane // 4
        tile = 4 * block + column // 2
        down, across = divmod(tile, rows // 16)
        n = 16 * across + 8 * (column % 2) + 4 * half + j
        assert stored - (1 << bits - 1) == kept[n, 16 * down + k], place


def kept_values(values: Array) -> Array:
    """Two of each four: the first two that are not 0, filled up as torch does."""
    pairs = {0: (2, 3), 1: (0, 2), 2: (1, 2), 4: (2, 3), 8: (2, 3)}
    stored = []
    for group in values.reshape(-1, 4).tolist():
        code = sum((value != 0) << i for i, value in enumerate(group))
        places = pairs.get(code, tuple(i for i in range(4) if code >> i & 1))
        stored += [group[places[0]], group[places[1]]]
    return np.array(stored).reshape(len(values), -1)


def test_the_scales_of_256_inputs_differ_between_the_two_kinds() -> None:
    values, scales = two_of_four(64, 256, 4), some_scales(64, 2)
    ours = marlin24.pack(values, scales, 4).scales
    theirs = marlin24.pack(values, scales, 4, gptq=True).scales
    assert np.array_equal(ours, scales.T)
    order = [i * 8 + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert np.array_equal(theirs, scales.T[:, order])


def test_a_group_of_three_is_refused() -> None:
    values = two_of_four(64, 64, 4)
    values[5, 8:12] = (1, 2, 3, 0)
    with pytest.raises(ModelError, match="row 5, group 2"):
        marlin24.pack(values, some_scales(64, 1), 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": np.zeros((8, 512), np.int64)}, "int64"),
        ({"weight": np.zeros((8, 130), np.int32)}, "beside meta"),
        ({"weight": np.zeros((4, 128), np.int32)}, "beside meta"),
        ({"meta": np.zeros((8, 120), np.int16)}, "multiple of 64 rows"),
        ({"meta": np.zeros((0, 128), np.int16)}, "multiple of 64 rows"),
        ({"meta": np.zeros(1024, np.int16)}, "not matrices"),
        ({"scales": np.zeros((3, 64), np.float16)}, "scales of shape"),
        ({"scales": np.zeros((2, 32), np.float16)}, "scales of shape"),
        ({"scales": np.zeros((2, 64), np.float32)}, "float32"),
    ],
)
def test_tensors_that_do_not_agree(change: dict[str, Array], said: str) -> None:
    packed = marlin24.pack(two_of_four(64, 256, 4), some_scales(64, 2), 4)
    with pytest.raises(ValueError, match=said):
        marlin24.unpack(dataclasses.replace(packed, **change))


def test_damaged_metadata() -> None:
    packed = marlin24.pack(two_of_four(64, 256, 4), some_scales(64, 2), 4)
    packed.meta[0, 0] = 0x5555  # position 1 twice
    with pytest.raises(ModelError, match="no pair of rising positions"):
        marlin24.unpack(packed)
