"""The SM80 layout against a plain reference, CUTLASS's host code, torch, and ``mma.sp``."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from secateur.compile import cpu
from secateur.compile.config import PackedLayer
from secateur.compile.gpu import sm80
from secateur.compile.stored import Pieces, pieces
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from tests.compile.gpu import mma_sp
from tests.compile.gpu.group_reference import CARRIERS, compress, draw

Array = np.ndarray[Any, Any]

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp32": torch.float32}
NUMBERS = {"fp16": 0, "bf16": 1, "int8": 2, "fp32": 3}  # of cutlass_host.cpp
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32}

many = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
types = st.sampled_from(sorted(TYPES))
fills = st.sampled_from([1.0, 0.9, 0.3, 0.0])
seeds = st.integers(0, 2**32 - 1)
ragged = st.tuples(st.integers(1, 70), st.integers(1, 280))


def itemsize(kind: str) -> int:
    return TYPES[kind].itemsize


def tensor(bits: Array, kind: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"int{8 * bits.itemsize}")).view(TYPES[kind])


def bits_of(weight: torch.Tensor) -> Array:
    carried: Array = weight.view(SIGNED[weight.itemsize]).numpy()
    return carried.view(CARRIERS[weight.itemsize])


def padded(array: Array, kind: str) -> Array:
    high, wide = sm80.MULTIPLES[itemsize(kind)]
    return np.pad(array, ((0, -len(array) % high), (0, -array.shape[1] % wide)))


def reorder_one_by_one(words: Array) -> Array:
    """The definition in CUTLASS's reorder_meta, stored as ColumnMajorInterleaved<2>."""
    rows, columns = words.shape
    group, between = (32, 4) if words.itemsize == 2 else (16, 2)
    flat = np.empty(words.size, words.dtype)
    for row in range(rows):
        for column in range(columns):
            to = row // group * group + row % 8 * between + row % group // 8
            across = column
            if to % 2 == 0 and across % 2 == 1:
                to, across = to + 1, across - 1
            elif to % 2 == 1 and across % 2 == 0:
                to, across = to - 1, across + 1
            flat[across // 2 * rows * 2 + to * 2 + across % 2] = words[row, column]
    return flat.reshape(rows, columns)


@pytest.mark.parametrize("by_mask", [True, False])
@many
@given(types, ragged, fills, seeds)
def test_every_byte_is_the_references(
    isa: str, by_mask: bool, kind: str, shape: tuple[int, int], fill: float, seed: int
) -> None:
    weight, mask = draw(np.random.default_rng(seed), shape, itemsize(kind), fill)
    kept = np.where(mask, weight, 0).astype(weight.dtype)
    packed = sm80.from_dense(weight if by_mask else kept, mask if by_mask else None, pad=True)
    values, nibbles = compress(padded(weight, kind), padded(mask, kind), "torch")
    word = np.int32 if weight.itemsize == 1 else np.int16
    words = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(word)
    assert np.array_equal(packed.values, values)
    assert packed.meta.dtype == word
    assert np.array_equal(packed.meta, reorder_one_by_one(words))
    assert packed.nbytes == values.nbytes + words.nbytes
    assert np.array_equal(packed.to_dense(), kept)


@many
@given(types, ragged, fills, seeds)
def test_cutlass_reads_it(
    cutlass: ctypes.CDLL, kind: str, shape: tuple[int, int], fill: float, seed: int
) -> None:
    weight, mask = draw(np.random.default_rng(seed), shape, itemsize(kind), fill)
    packed = sm80.from_dense(weight, mask, pad=True)
    rows, half = packed.values.shape
    dense = np.full((rows, 2 * half), 0xAA, weight.dtype)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (packed.values, packed.meta)]
    to = dense.ctypes.data_as(ctypes.c_void_p)
    assert cutlass.sm80_uncompress(NUMBERS[kind], *pointers, rows, 2 * half, to) == 0
    assert dense.tobytes() == padded(np.where(mask, weight, 0).astype(weight.dtype), kind).tobytes()


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_cutlass_multiplies_what_it_reads(cutlass: ctypes.CDLL, kind: str) -> None:
    rng = np.random.default_rng(3)
    m, n, k = 64, 24, 256
    _, mask = draw(rng, (m, k), itemsize(kind), 0.9)
    a = torch.from_numpy(rng.integers(-9, 10, (m, k)) * mask).to(TYPES[kind])
    b = torch.from_numpy(rng.integers(-9, 10, (n, k))).to(TYPES[kind])
    packed = sm80.from_dense(bits_of(a), mask)
    dense = np.empty((m, k), packed.values.dtype)
    c = np.full((m, n), 77, np.int32 if kind == "int8" else np.float32)
    values, meta, whole, right, result = (
        array.ctypes.data_as(ctypes.c_void_p)
        for array in (packed.values, packed.meta, dense, bits_of(b), c)
    )
    assert cutlass.sm80_uncompress(NUMBERS[kind], values, meta, m, k, whole) == 0
    assert cutlass.host_gemm(NUMBERS[kind], whole, right, result, m, n, k) == 0
    assert np.array_equal(c, (a.double() @ b.double().T).numpy())  # whole numbers: exact


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype")
@many
@given(types, st.integers(1, 3), st.integers(1, 3), fills, seeds)
def test_torch_writes_and_reads_the_same_bytes(
    kind: str, high: int, wide: int, fill: float, seed: int
) -> None:
    rows, columns = sm80.MULTIPLES[itemsize(kind)]
    shape = rows * high, columns * wide
    weight, mask = draw(np.random.default_rng(seed), shape, itemsize(kind), fill)
    dense = tensor(np.where(mask, weight, 0).astype(weight.dtype), kind)
    dense = torch.where(torch.isnan(dense), 1, dense) if kind != "int8" else dense
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    packed = sm80.from_dense(bits_of(dense))
    assert np.array_equal(packed.values, bits_of(values))
    assert packed.meta.dtype == meta.numpy().dtype
    assert np.array_equal(packed.meta, meta.numpy())
    if kind != "fp32":  # torch's way back changes bits of fp32
        theirs = SparseSemiStructuredTensorCUTLASS(
            dense.shape,
            packed=tensor(packed.values, kind),
            meta=torch.from_numpy(packed.meta),
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )
        assert np.array_equal(bits_of(theirs.to_dense()), bits_of(dense))


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 32), ("int8", 64)])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), fills, seeds)
def test_tensor_cores_multiply_it(
    kind: str, depth: int, high: int, wide: int, fill: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = sm80.MULTIPLES[itemsize(kind)]
    m, k = rows * high, columns * wide
    _, mask = draw(rng, (m, k), itemsize(kind), fill)
    a = torch.from_numpy(rng.integers(-9, 10, (m, k)) * mask)
    b = rng.integers(-9, 10, (k, 8))
    packed = sm80.from_dense(bits_of(a.to(TYPES[kind])), mask)
    numbers = tensor(packed.values, kind).double().numpy().astype(np.int64)
    assert k % depth == 0
    assert np.array_equal(mma_sp.product(numbers, packed.meta, b), a.numpy() @ b)


def test_mma_sp_itself() -> None:
    """One lane's registers, by hand: lane 5 has row 1 and stored columns 2, 3, 10, 11 of it."""
    stored = np.arange(16 * 16).reshape(16, 16)
    a = mma_sp.fragment_a(stored, 2)
    assert a[5].tolist() == [18, 19, 146, 147, 26, 27, 154, 155]
    e = np.full(32, 0x44444444, np.uint32)  # the first two of each four
    e[4] = 0x4444E444  # row 1, columns 12 to 15: the last two
    b = mma_sp.fragment_b(np.eye(32, 8, -8, np.int64), 2)  # columns 8 to 15 of A
    d = mma_sp.of_d(mma_sp.mma_sp(a, b, np.zeros((32, 4), np.int64), e, 0))
    assert d[0].tolist() == [4, 5, 0, 0, 6, 7, 0, 0]
    assert d[1].tolist() == [20, 21, 0, 0, 0, 0, 22, 23]
    with pytest.raises(ValueError, match="no meaning"):
        mma_sp.mma_sp(a, b, np.zeros((32, 4), np.int64), np.zeros(32, np.uint32), 0)
    with pytest.raises(ValueError, match="selector 2"):
        mma_sp.mma_sp(a, b, np.zeros((32, 4), np.int64), e, 2)


def linear(kind: str, pattern: str, weight: Array, mask: Array) -> Pieces:
    """A packed linear; 16-bit values are those of bf16."""
    rows, columns = weight.shape
    layer = PackedLayer(
        pattern=Pattern.parse(pattern),
        shape=(rows, columns),
        kept=int(mask.sum()),
        per_row=int(mask[0].sum()),
    )
    values = weight[mask].reshape(rows, -1)
    bits = np.packbits(mask[:: layer.pattern.rows], axis=1, bitorder="little")
    if kind == "int8":
        scales = np.ones((rows, -(-columns // 64)), np.float16)
        return pieces("w", layer, bits, values.view(np.int8), scales, "int8", 64)
    if kind == "fp32":
        return pieces("w", layer, bits, values.view(np.float32), None, "fp32", None)
    return pieces("w", layer, bits, values, None, "bf16", None)


def pattern_mask(pattern: str, rows: int, columns: int, rng: np.random.Generator) -> Array:
    chosen = Pattern.parse(pattern)
    order = rng.random((rows // chosen.rows, columns // chosen.m, chosen.m)).argsort(axis=2)
    kept = (order < chosen.n).reshape(rows // chosen.rows, columns)
    return np.repeat(kept, chosen.rows, axis=0)


@pytest.mark.parametrize(
    ("kind", "pattern", "shape"),
    [
        ("bf16", "2:4", (32, 64)),
        ("bf16", "2:4", (17, 92)),
        ("bf16", "1:4", (32, 64)),
        ("bf16", "1:2", (31, 62)),
        ("bf16", "2:4@16x1", (64, 192)),
        ("int8", "2:4", (48, 256)),
        ("int8", "2:4", (5, 100)),
        ("int8", "1:8", (16, 136)),
        ("fp32", "1:2", (32, 96)),
        ("fp32", "1:2", (7, 30)),
        ("fp32", "1:4", (32, 32)),
    ],
)
def test_a_packed_linear_and_back(kind: str, pattern: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(8)
    weight, _ = draw(rng, shape, itemsize(kind), 1.0)
    if kind == "int8":
        weight[weight == 128] = 1  # -128 occurs in no packed model
    mask = pattern_mask(pattern, *shape, rng)
    packed = sm80.from_pieces(linear(kind, pattern, weight, mask), pad=True)
    theirs = sm80.from_dense(weight, mask, pad=True)
    assert packed.shape == shape
    assert np.array_equal(packed.values, theirs.values)
    assert np.array_equal(packed.meta, theirs.meta)
    group = 2 if kind == "fp32" else 4
    scales = np.ones((shape[0], -(-shape[1] // 64)), np.float16) if kind == "int8" else None
    back = (kind, scales, scales if scales is None else 64)
    if shape[1] % group:
        with pytest.raises(ModelError, match=f"{shape[1]} columns are no multiple of {group}"):
            packed.to_pieces(*back)  # type: ignore[arg-type]
        return
    again = packed.to_pieces(*back)  # type: ignore[arg-type]
    assert again.layer.pattern == Pattern.parse("1:2" if kind == "fp32" else "2:4")
    assert again.value_type == kind
    assert again.bitmask is not None
    kept = np.unpackbits(again.bitmask, axis=1, count=shape[1], bitorder="little") != 0
    assert not (mask & ~kept).any()
    dense = np.zeros_like(weight)
    dense[kept] = again.values.view(weight.dtype).reshape(-1)
    assert np.array_equal(dense, np.where(mask, weight, 0))


def test_kept_zeros_stay_where_the_mask_has_them() -> None:
    mask = np.tile([True, False, False, True], (32, 16))
    zeros = np.zeros((32, 64), np.uint16)
    packed = sm80.from_dense(zeros, mask)
    assert (packed.meta == np.int16(0xCCCC - 0x10000)).all()
    assert (sm80.from_dense(zeros).meta == np.int16(0xEEEE - 0x10000)).all()


def test_zeros_that_fill_groups_are_plus_zero() -> None:
    """Whatever the removed weights were."""
    weight = np.full((32, 64), 0x8001, np.uint16)
    mask = np.zeros((32, 64), np.bool_)
    mask[:, ::4] = True
    packed = sm80.from_dense(weight, mask)
    assert packed.values.tolist() == [[0x8001, 0] * 16] * 32
    assert not sm80.from_dense(np.full((32, 64), 0x8000, np.uint16)).values.any()  # -0
    assert sm80.from_dense(np.full((32, 64), 0x8000, np.uint16), mask).values[0, 0] == 0x8000


@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize(("size", "tail"), [(2, 0), (2, 3), (1, 0), (1, 7), (4, 0), (4, 1)])
def test_a_group_that_keeps_too_many(isa: str, size: int, tail: int, by_mask: bool) -> None:
    group = 2 if size == 4 else 4
    weight, mask = draw(np.random.default_rng(1), (70, 256 + tail), size, 0.5)
    mask[[33, 50], 252:256] = [True, True, True, False]
    kept = np.where(mask, weight, 0).astype(weight.dtype)
    first, count = 252 // group, group // 2 + 1
    said = (
        f"row 33, group {first} (columns {252} to {251 + group}) keeps {count} of {group} weights"
    )
    with pytest.raises(ModelError, match=re.escape(said)) as refused:
        sm80.from_dense(weight if by_mask else kept, mask if by_mask else None, pad=True)
    assert f"--pattern {group // 2}:{group}" in refused.value.fix


@pytest.mark.parametrize(
    ("dtype", "shape", "takes"),
    [
        (np.uint16, (33, 64), "33x64 weight of 16-bit .* 32 rows and 64 columns"),
        (np.uint16, (32, 96), "32x96 weight of 16-bit .* 32 rows and 64 columns"),
        (np.int8, (16, 64), "16x64 weight of 8-bit .* 16 rows and 128 columns"),
        (np.float32, (32, 48), "32x48 weight of 32-bit .* 32 rows and 32 columns"),
    ],
)
def test_shapes_that_do_not_fit(dtype: Any, shape: tuple[int, int], takes: str) -> None:
    with pytest.raises(ModelError, match=takes) as refused:
        sm80.from_dense(np.zeros(shape, dtype))
    assert "pad=True" in refused.value.fix
    assert sm80.from_dense(np.zeros(shape, dtype), pad=True).to_dense().shape == shape


def test_what_has_no_such_layout() -> None:
    with pytest.raises(ModelError, match="no sparse tensor core takes float64 of 2 axes"):
        sm80.from_dense(np.zeros((32, 64)))
    with pytest.raises(ModelError, match="no sparse tensor core takes uint16 of 1 axes"):
        sm80.from_dense(np.zeros(64, np.uint16))
    dense = PackedLayer(pattern=Pattern(), shape=(32, 64), kept=2048, per_row=64)
    with pytest.raises(ModelError, match="a dense linear has no 2:4 layout"):
        sm80.from_pieces(Pieces(dense, None, np.zeros((32, 64), np.uint16), None, "bf16", None))
    mask = np.tile([True, True, False, False], (32, 16))
    layer = PackedLayer(pattern=Pattern.parse("2:4"), shape=(32, 64), kept=1024, per_row=32)
    bits = np.packbits(mask, axis=1, bitorder="little")
    nibbles = Pieces(layer, bits, np.zeros(512, np.uint8), None, "int4", 64)
    with pytest.raises(ModelError, match="a linear of int4 values has no 2:4 layout"):
        sm80.from_pieces(nibbles)
    with pytest.raises(UsageError, match="values of 16 bits are not int8"):
        sm80.from_dense(np.zeros((32, 64), np.uint16)).to_pieces("int8")
    with pytest.raises(ValueError, match="bits of another shape"):
        sm80.from_dense(np.zeros((32, 64), np.uint16), mask[:, :32])
    fp32 = linear("fp32", "2:4", np.ones((32, 64), np.float32), mask)
    with pytest.raises(ModelError, match=r"row 0, group 0 .* keeps 2 of 2 weights"):
        sm80.from_pieces(fp32)


@pytest.mark.parametrize("nibble", [0, 1, 2, 3, 5, 6, 7, 10, 11, 15])
def test_metadata_that_means_nothing(isa: str, nibble: int) -> None:
    packed = sm80.from_dense(np.tile(np.array([1, 1, 0, 0], np.uint16), (64, 32)))
    words = sm80.restore(packed.meta).view(np.uint8)
    words[41, 7] = 4 | nibble << 4
    damaged = sm80.Sm80(packed.values, sm80.reorder(words.view(np.int16)), packed.shape)
    with pytest.raises(ModelError, match="metadata of row 41 holds a nibble"):
        damaged.to_dense()
    with pytest.raises(ModelError, match="metadata of row 41 holds a nibble"):
        damaged.to_pieces("bf16")


def test_threads_change_nothing() -> None:
    weight, mask = draw(np.random.default_rng(0), (512, 1024), 2, 0.9)
    before = cpu.threads()
    packed = {}
    try:
        for count in (1, 2):
            cpu.set_threads(count)
            packed[count] = sm80.from_dense(weight, mask)
            assert np.array_equal(packed[count].to_dense(), np.where(mask, weight, 0))
    finally:
        cpu.set_threads(before)
    assert np.array_equal(packed[1].values, packed[2].values)
    assert np.array_equal(packed[1].meta, packed[2].meta)
