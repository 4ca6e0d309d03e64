"""The layout of blocks, read position by position as its page says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compile import e4m3
from secateur.compile.gpu.blocks import Blocks, make_blocks
from tests.compile.gpu.linears import draw

ZERO = {"int8": 128, "int4": 8}


def read(blocks: Blocks) -> np.ndarray:
    """The dense weight, one position at a time."""
    height, width = blocks.block_rows, blocks.block_columns
    rows, columns = blocks.row_blocks * height, blocks.column_blocks * width
    bits, values = blocks.bits.numpy(), blocks.values
    if blocks.value_type in ZERO:
        flat = values.numpy().reshape(-1)
        if blocks.value_type == "int4":
            flat = np.stack([flat & 15, flat >> 4], axis=1).reshape(-1)
        flat = flat.astype(np.int32) - ZERO[blocks.value_type]
    elif blocks.value_type == "fp8":
        flat = e4m3.NUMBERS[values.numpy().reshape(-1)]
    else:
        flat = values.float().numpy().reshape(-1)
    dense = np.zeros((rows, columns), np.float32)
    per_unit = 16 * 8 // blocks.value_bits
    assert bits.shape == (rows, columns // 8)
    for i in range(blocks.row_blocks):
        for j in range(blocks.column_blocks):
            rank = 0
            if blocks.starts is not None:
                first = int(blocks.starts[i * blocks.column_blocks + j]) * per_unit
            for row in range(i * height, (i + 1) * height):
                if blocks.starts is None:
                    rank, first = 0, (row * columns + j * width) // 2
                group = 0 if blocks.value_type == "fp8" else j
                scale = 1.0 if blocks.scales is None else float(blocks.scales[group, row])
                for column in range(j * width, (j + 1) * width):
                    if bits[row, column // 8] >> (column % 8) & 1:
                        dense[row, column] = flat[first + rank] * np.float32(scale)
                        rank += 1
    assert not dense[blocks.rows :].any()
    assert not dense[:, blocks.columns :].any()
    return dense[: blocks.rows, : blocks.columns]


@settings(max_examples=20, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "4:8", "1:4", "60%", "95%", "10%"]),
    values=st.sampled_from(["bf16", "fp16", "int8", "int4", "fp8"]),
    rows=st.integers(1, 70),
    groups=st.integers(1, 18),
    size=st.sampled_from([32, 64, 128]),
)
def test_blocks_hold_the_weight(
    pattern: str, values: str, rows: int, groups: int, size: int
) -> None:
    pieces, weight = draw(pattern, values, rows, 8 * groups, size)
    blocks = make_blocks(pieces)
    assert blocks.two_four == (pattern == "2:4")
    assert np.array_equal(read(blocks), weight.numpy())


def test_stored_two_four_is_already_in_blocks() -> None:
    pieces, _ = draw("2:4", "bf16", 32, 256)
    blocks = make_blocks(pieces)
    assert np.array_equal(blocks.values.view(torch.uint16).numpy(), pieces.values)
    assert pieces.bitmask is not None
    assert np.array_equal(blocks.bits.numpy(), pieces.bitmask)


@pytest.mark.parametrize(
    ("pattern", "values", "each"),
    [
        ("2:4", "bf16", 1.125),
        ("2:4", "int8", 0.625 + 2 / 128),
        ("2:4", "int4", 0.375 + 2 / 128),
        ("50%", "bf16", 1.125),
        ("80%", "fp16", 0.525),
        ("50%", "int8", 0.625 + 2 / 128),
        ("80%", "int4", 0.225 + 2 / 128),
        ("2:4", "fp8", 0.625 + 4 / 512),
        ("80%", "fp8", 0.325 + 4 / 512),
    ],
)
def test_bytes_per_weight(pattern: str, values: str, each: float) -> None:
    pieces, weight = draw(pattern, values, 128, 512, 128)
    found = make_blocks(pieces).nbytes / weight.numel()
    assert each <= found < each + 0.005


def test_what_has_no_blocks() -> None:
    for pattern, values in (("dense", "bf16"), ("2:4", "fp32")):
        with pytest.raises(ValueError, match="has no blocks"):
            make_blocks(draw(pattern, values, 8, 32)[0])
