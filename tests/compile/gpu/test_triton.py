"""The Triton kernels, in triton's interpreter, against products in fp64 with the exact weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compile import quantize
from secateur.compile.config import PackedLayer
from secateur.compile.gpu import triton_product
from secateur.compile.gpu.blocks import make_blocks
from secateur.compile.gpu.triton_product import (
    multiply,
    parts_of,
    round_tokens,
    tile_tokens,
    unpack,
)
from secateur.compile.packed import decode
from secateur.compile.packed import pieces as packed_pieces
from secateur.pattern import Pattern
from tests.compile.gpu.linears import HALVES, assert_product, draw, pack

PATTERNS = ["2:4", "4:8", "50%", "50%@8x1", "90%"]


def test_the_kernels_are_interpreted() -> None:
    assert triton_product.INTERPRETED


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_and_unpacked_weights(pattern: str, values: str) -> None:
    pieces, weight = draw(pattern, values, 40, 168, 64)
    blocks = make_blocks(pieces)
    for name, dtype in HALVES.items():
        if values in HALVES and values != name:
            continue
        x = torch.randn(3, 168).to(dtype)
        assert_product(multiply(x, blocks), x, weight)
    # The interpreter rounds to fp16 as a GPU does, and to bf16 towards zero.
    dtype = torch.bfloat16 if values == "bf16" else torch.float16
    assert torch.equal(unpack(blocks, dtype), weight.to(dtype))


def test_fp8_of_every_byte() -> None:
    """Both signs, subnormals and zeros, as fp16, bf16 and bytes."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[~numbers.view(torch.float8_e4m3fn).float().isnan()][:252].view(2, 126)
    bits = torch.full((2, 32), 0x33, dtype=torch.uint8)
    bits[:, -1] = 0x03
    kept = torch.cat([numbers, torch.zeros(2, 0, dtype=torch.uint8)], dim=1)
    layer = PackedLayer(pattern=Pattern.parse("2:4"), shape=(2, 252), kept=252, per_row=126)
    scales = torch.tensor([[0.75], [2.0]])
    blocks = make_blocks(packed_pieces("layer", layer, bits, kept, scales))
    exact = decode("layer", layer, bits, kept, scales)
    for dtype in HALVES.values():
        assert torch.equal(unpack(blocks, dtype), exact.to(dtype))
        x = torch.eye(252, dtype=dtype)
        assert torch.equal(multiply(x, blocks).t(), exact.to(dtype))
    stored = unpack(blocks, torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(stored.float() * scales, exact)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), values=st.sampled_from(["bf16", "fp16", "int8", "int4", "fp8"]))
def test_any_mask_shape_and_number_of_tokens(data: st.DataObject, values: Any) -> None:
    """Ragged edges, empty and full rows and blocks, rows of zeros."""
    rows, columns = data.draw(st.integers(1, 80)), data.draw(st.integers(2, 300))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    share = data.draw(st.sampled_from([0.02, 0.3, 0.5, 0.9]))
    mask = torch.rand(rows, columns) < share
    emptied = data.draw(st.sampled_from(["rows", "columns", "nothing"]))
    if emptied == "rows":
        mask[torch.rand(rows) < 0.4] = False
        mask[torch.rand(rows) < 0.2] = True
    elif emptied == "columns":
        mask[:, : columns // 2] = False
    mask[0, 0], mask[-1, -1] = True, False
    weight = torch.randn(rows, columns)
    weight[torch.rand(rows) < 0.2] = 0
    removed = 100 * float((~mask).double().mean())
    pieces, exact = pack(weight, mask, Pattern.parse(f"{removed:.6f}%"), values, 32)
    dtype = HALVES.get(values, torch.bfloat16)
    x = torch.randn(data.draw(st.integers(1, 70)), columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if data.draw(st.booleans()) else None
    assert_product(multiply(x, make_blocks(pieces), bias), x, exact, bias)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 80),
    groups=st.integers(1, 80),
    tokens=st.integers(1, 20),
    values=st.sampled_from(["bf16", "fp16", "int8", "int4", "fp8"]),
)
def test_two_four_of_any_shape(rows: int, groups: int, tokens: int, values: str) -> None:
    pieces, weight = draw("2:4", values, rows, 4 * groups)
    x = torch.randn(tokens, 4 * groups).to(HALVES.get(values, torch.float16))
    assert_product(multiply(x, make_blocks(pieces)), x, weight)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_every_group_of_two_four(pattern: str) -> None:
    """All six masks of a group, in all places of a byte, with inputs that tell columns apart."""
    masks = [m for m in range(16) if m.bit_count() == 2]
    rows = [[a, b] for a in masks for b in masks]
    mask = torch.tensor([[[m >> i & 1 for i in range(4)] for m in row] for row in rows]).bool()
    weight = torch.arange(1, 36 * 8 + 1).reshape(36, 8).float() % 61
    pieces, exact = pack(weight, mask.reshape(36, 8), Pattern.parse(pattern), "fp16")
    assert torch.equal(multiply(torch.eye(8).half(), make_blocks(pieces)), exact.T.half())


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_programs_that_share_a_row(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(triton_product, "parts_of", lambda *_: parts)
    pieces, weight = draw("2:4", "int8", 40, 160)
    x, bias = torch.randn(3, 160).half(), torch.randn(40).half()
    assert_product(multiply(x, make_blocks(pieces), bias), x, weight, bias)
    assert_product(multiply(x, make_blocks(pieces)), x, weight)


@given(
    row_blocks=st.integers(1, 500),
    column_blocks=st.integers(1, 500),
    tiles=st.integers(1, 64),
    processors=st.integers(1, 150),
)
def test_parts_cover_a_row_without_idle_programs(
    row_blocks: int, column_blocks: int, tiles: int, processors: int
) -> None:
    parts = parts_of(row_blocks, column_blocks, tiles, processors)
    each = -(-column_blocks // parts)
    assert parts == 1 or each >= 4
    assert (parts - 1) * each < column_blocks <= parts * each
    assert parts == 1 or parts * row_blocks * tiles <= 8 * processors


def test_tiles_of_tokens() -> None:
    assert [tile_tokens(n) for n in (1, 16, 17, 32, 33, 64, 65, 5000)] == [
        *(16, 16, 32, 32, 64, 64, 64, 64)
    ]


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 5),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-5, 1.0, 1e4]),
)
def test_inputs_are_rounded_to_the_bit(
    tokens: int, columns: int, dtype: torch.dtype, size: float
) -> None:
    x = (torch.randn(tokens, columns) * size).to(dtype)
    x[0] = 0
    rounded, scales = round_tokens(x)
    wanted, wanted_scales = quantize.round_tokens(x)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(rounded.view(torch.uint8), wanted.view(torch.uint8))
