"""The SM90 layout against a plain reference, CUTLASS's own layout and its compressor's bytes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from secateur.compile.config import PackedLayer
from secateur.compile.gpu import sm80, sm90
from secateur.compile.stored import pieces
from secateur.errors import ModelError
from secateur.pattern import Pattern
from tests.compile.gpu.group_reference import CARRIERS, compress, draw

Array = np.ndarray[Any, Any]

TILES = [(1, 64), (1, 128), (2, 32), (2, 64), (2, 128)]
GOLDENS = Path(__file__).parent / "sm90_compressor.safetensors"

many = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
tiles = st.sampled_from(TILES)
fills = st.sampled_from([1.0, 0.9, 0.3, 0.0])
seeds = st.integers(0, 2**32 - 1)
ragged = st.tuples(st.integers(1, 140), st.integers(1, 280))


def cutlass_offsets(
    cutlass: ctypes.CDLL, shape: tuple[int, int], size: int, tile_k: int
) -> tuple[Array, int]:
    """Where CUTLASS puts the metadata of every weight, ``[rows, columns]`` as it pads them.

    Returns:
        The offsets, in weights, and what the columns of the stored values are a multiple of.
    """
    rows, columns = (
        -(-extent // step) * step for extent, step in zip(shape, (64, tile_k), strict=True)
    )
    offsets = np.full((rows, columns), -1, np.int64)
    to = offsets.ctypes.data_as(ctypes.c_void_p)
    return offsets, cutlass.sm90_offsets(size, tile_k, *shape, to)


@many
@given(tiles, ragged, fills, seeds)
def test_every_byte_is_where_cutlass_has_it(
    isa: str,
    cutlass: ctypes.CDLL,
    tile: tuple[int, int],
    shape: tuple[int, int],
    fill: float,
    seed: int,
) -> None:
    size, tile_k = tile
    weight, mask = draw(np.random.default_rng(seed), shape, size, fill)
    offsets, multiple = cutlass_offsets(cutlass, shape, size, tile_k)
    assert sorted(offsets.reshape(-1).tolist()) == list(range(offsets.size))
    packed = sm90.from_dense(weight, mask, tile_k=tile_k, pad=True)
    wide = -(-shape[1] // multiple) * multiple
    edges = ((0, offsets.shape[0] - shape[0]), (0, max(wide, offsets.shape[1]) - shape[1]))
    values, nibbles = compress(np.pad(weight, edges), np.pad(mask, edges), "sm90")
    assert np.array_equal(packed.values, values[: shape[0], : wide // 2])
    assert packed.meta.shape == (offsets.size // 8,)
    theirs = np.zeros(offsets.size // 8, np.uint8)  # a nibble for four weights
    for row, column in np.ndindex(offsets.shape[0], offsets.shape[1] // 4):
        offset = offsets[row, 4 * column]
        theirs[offset // 8] |= nibbles[row, column] << offset % 8
    assert np.array_equal(packed.meta, theirs)
    assert packed.nbytes == packed.values.nbytes + packed.meta.nbytes
    assert np.array_equal(packed.to_dense(), np.where(mask, weight, 0))


def test_goldens_of_cutlass_compressor() -> None:
    """Bytes that CUTLASS's compressor wrote; README.md says how they were made."""
    goldens = load_file(GOLDENS)
    cases = sorted({name.split("/")[0] for name in goldens})
    assert len(cases) == 5
    for case in cases:
        weight, values, meta = (goldens[f"{case}/{part}"] for part in ("dense", "values", "meta"))
        packed = sm90.from_dense(weight, tile_k=int(case.split("-")[2]), pad=True)
        assert np.array_equal(packed.values, values), case
        assert np.array_equal(packed.meta, meta), case
        assert np.array_equal(packed.to_dense(), weight), case


@pytest.mark.parametrize(("size", "tile_k"), TILES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4@4x1"])
def test_a_packed_linear_and_back(size: int, tile_k: int, pattern: str) -> None:
    rng = np.random.default_rng(4)
    weight, _ = draw(rng, (72, 164), size, 1.0)
    weight[weight == 128] = 1
    chosen = Pattern.parse(pattern)
    order = rng.random((72 // chosen.rows, 41, 4)).argsort(axis=2)
    mask = np.repeat((order < chosen.n).reshape(-1, 164), chosen.rows, axis=0)
    layer = PackedLayer(
        pattern=chosen, shape=(72, 164), kept=int(mask.sum()), per_row=int(mask[0].sum())
    )
    bits = np.packbits(mask[:: chosen.rows], axis=1, bitorder="little")
    scales, group = (np.ones((72, 3), np.float16), 64) if size == 1 else (None, None)
    kind: Any = "int8" if size == 1 else "fp16"
    values = weight[mask].reshape(72, -1).view(np.int8 if size == 1 else np.uint16)
    linear = pieces("w", layer, bits, values, scales, kind, group)
    packed = sm90.from_pieces(linear, tile_k=tile_k, pad=True)
    theirs = sm90.from_dense(weight, mask, tile_k=tile_k, pad=True)
    assert np.array_equal(packed.values, theirs.values)
    assert np.array_equal(packed.meta, theirs.meta)
    again = packed.to_pieces(kind, scales, group)
    assert again.bitmask is not None
    kept = np.unpackbits(again.bitmask, axis=1, count=164, bitorder="little") != 0
    dense = np.zeros_like(weight)
    dense[kept] = again.values.view(weight.dtype).reshape(-1)
    assert np.array_equal(dense, np.where(mask, weight, 0))
    if pattern == "2:4":
        assert np.array_equal(again.bitmask, bits)
        assert np.array_equal(again.values, linear.values)
        sm = sm80.from_pieces(linear, pad=True)
        assert np.array_equal(sm.values[:72, :82], packed.values[:, :82])


def test_what_has_no_such_layout() -> None:
    with pytest.raises(ModelError, match="no tile of 32 columns of 8-bit values") as refused:
        sm90.from_dense(np.zeros((64, 128), np.int8), tile_k=32)
    assert "8-bit values with tiles of (64, 128)" in refused.value.fix
    with pytest.raises(ModelError, match="no tile of 128 columns of 32-bit values"):
        sm90.from_dense(np.zeros((64, 128), np.float32))
    with pytest.raises(ModelError, match=r"70x24 weight of 16-bit .* 1 rows and 16 columns"):
        sm90.from_dense(np.zeros((70, 24), np.uint16))
    three = np.zeros((64, 128), np.uint16)
    three[9, 20:23] = 5
    with pytest.raises(ModelError, match=r"row 9, group 5 .* keeps 3 of 4 weights"):
        sm90.from_dense(three)


@pytest.mark.parametrize("nibble", [1, 2, 3, 5, 6, 7, 10, 11, 15])
def test_metadata_that_means_nothing(isa: str, nibble: int) -> None:
    packed = sm90.from_dense(np.zeros((64, 128), CARRIERS[2]))
    nibbles = np.zeros((64, 16), np.uint8)
    nibbles[41, 15] = nibble
    damaged = sm90.Sm90(packed.values, sm90.reorder(nibbles, 2, 128), packed.shape, 128)
    with pytest.raises(ModelError, match="metadata of row 41 holds a nibble"):
        damaged.to_dense()
    with pytest.raises(ModelError, match="metadata of row 41 holds a nibble"):
        damaged.to_pieces("bf16")
