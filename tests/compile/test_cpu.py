"""Products of the CPU kernels equal float64 of the stored weights, whatever the shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compile import cpu
from tests.compile.cpu_reference import (
    TYPES,
    Weight,
    decoded,
    draw_mask,
    error,
    make_weight,
    product,
    quantised,
    restored,
)

PATTERNS = ["dense", "2:4", "4:8", "4:16", "1:4", "1:8", "3:4", "2:4@8x1", "2:4@16x1"]
PATTERNS += ["50%", "80%", "90%", "50%@4x1", "50%@8x1", "50%@16x1", "75%@16x1"]
TOKENS = [1, 2, 3, 4, 5, 16, 17, 40, 60, 85]
# Around the steps of the layouts: 8 rows, 16 rows; 16, 32, 64 and 256 columns.
EDGES = [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 129, 255, 256, 257, 300]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    with restored():
        yield


def steps(draw: st.DrawFn, of: int, limit: int) -> int:
    """A multiple of ``of`` up to about ``limit``."""
    wanted = draw(st.sampled_from(EDGES) | st.integers(1, limit))
    return max(1, min(wanted, limit) // of) * of


@st.composite
def weights(draw: st.DrawFn, pattern: str, value_type: cpu.Values) -> Weight:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = make_weight(rng, (16, 16), pattern, value_type)
    block, window = weight.pattern.rows, max(1, weight.pattern.m)
    shape = steps(draw, block, 40), steps(draw, window, 320)
    group_size = draw(st.sampled_from([32, 64, 128]))
    mask = None
    if not (weight.pattern.is_nm or weight.pattern.is_dense):  # rows of none and of all
        mask = draw_mask(rng, shape, weight.pattern)
        for kept in (False, True):
            row = draw(st.integers(0, shape[0] // block - 1)) * block
            if draw(st.booleans()):
                mask[row : row + block] = kept
    return make_weight(rng, shape, pattern, value_type, group_size, mask)


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_products(pattern: str, value_type: cpu.Values, data: st.DataObject) -> None:
    weight = data.draw(weights(pattern, value_type))
    rng = np.random.default_rng(1)
    matrix = weight.pack()
    assert np.array_equal(matrix.decode(), decoded(weight, matrix.layout))
    for name in cpu.isas():
        cpu.use_isa(name)
        for tokens in data.draw(st.lists(st.sampled_from(TOKENS), min_size=3, unique=True)):
            x = rng.standard_normal((tokens, weight.shape[1]), np.float32)
            assert error(matrix.matmul(x), weight, matrix, x) < 1e-6, (name, tokens)


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("value_type", ["int8", "int4"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_activations_of_integers(pattern: str, value_type: Any, activations: Any) -> None:
    rng = np.random.default_rng(2)
    weight = make_weight(rng, (48, 208), pattern, value_type)
    matrix = weight.pack(activations=activations)
    for name in cpu.isas():
        cpu.use_isa(name)
        for tokens in (1, 3, 16, 17, 35):
            x = rng.standard_normal((tokens, 208), np.float32)
            assert error(matrix.matmul(x), weight, matrix, x) < 1e-6


@pytest.mark.parametrize("value_type", ["int8", "int4"])
def test_which_products_round_their_inputs(value_type: cpu.Values) -> None:
    """All with few tokens; with many, blocks only with AVX-512."""
    rng = np.random.default_rng(12)
    for pattern in ("dense", "2:4", "4:16", "90%", "90%@4x1", "85%@8x1", "95%@8x1", "90%@16x1"):
        weight = make_weight(rng, (64, 512), pattern, value_type)
        matrix, exact = weight.pack(), weight.pack(activations="fp32")
        many = not matrix.layout.endswith("x1")
        for name in cpu.isas():
            cpu.use_isa(name)
            for tokens in (1, 3, 16, 17, 128):
                rounds = tokens <= 16 or many or name == "avx512"
                assert matrix.rounds_inputs(tokens) == rounds, (pattern, name, tokens)
                assert not exact.rounds_inputs(tokens)


ASKED = [(layout, name) for layout in ("dense", "4:16+rest") for name in TYPES]
ASKED += [("bitmask", "fp32"), ("bitmask", "bf16"), ("bitmask", "fp16")]


@pytest.mark.parametrize(("layout", "value_type"), ASKED)
@pytest.mark.parametrize("pattern", ["2:4", "50%", "90%", "50%@8x1"])
def test_layouts_that_are_asked_for(pattern: str, layout: str, value_type: cpu.Values) -> None:
    rng = np.random.default_rng(3)
    weight = make_weight(rng, (40, 196), pattern, value_type, 32)
    matrix = weight.pack(layout=layout)
    assert matrix.layout == layout
    assert np.array_equal(matrix.decode(), decoded(weight, layout))
    for name in cpu.isas():
        cpu.use_isa(name)
        for tokens in (1, 6, 40):
            x = rng.standard_normal((tokens, 196), np.float32)
            assert error(matrix.matmul(x), weight, matrix, x) < 1e-6


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", ["dense", "2:4", "4:16", "80%", "50%@4x1", "50%@16x1"])
def test_a_wide_matrix(pattern: str, value_type: cpu.Values) -> None:
    """Relative to the norm of the product itself, with many terms of a sum."""
    rng = np.random.default_rng(4)
    weight = make_weight(rng, (64, 2048), pattern, value_type, 128)
    matrix = weight.pack()
    for name in cpu.isas():
        cpu.use_isa(name)
        for tokens in (1, 4, 40):
            x = rng.standard_normal((tokens, 2048), np.float32)
            wanted, _ = product(weight, matrix, x)
            found = matrix.matmul(x)
            assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-6


@pytest.mark.parametrize("value_type", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(
    "pattern", ["dense", "2:4", "90%", "75%@4x1", "50%@8x1", "90%@8x1", "90%@16x1"]
)
def test_more_tokens_and_rows_than_one_round_takes(pattern: str, value_type: cpu.Values) -> None:
    """Two batches of tokens, pieces of columns, several groups of rows for each thread."""
    rng = np.random.default_rng(5)
    weight = make_weight(rng, (400, 1300), pattern, value_type, 64)
    matrix = weight.pack()
    x = rng.standard_normal((250, 1300), np.float32)
    for name in cpu.isas():
        cpu.use_isa(name)
        for threads in (1, 2):
            cpu.set_threads(threads)
            assert error(matrix.matmul(x), weight, matrix, x) < 1e-6


@pytest.mark.parametrize("pattern", ["dense", "2:4", "75%@16x1", "90%"])
def test_int8_activations_lose_little(pattern: str) -> None:
    """Gaussian activations: 0.6 % with groups of 64 columns, less with groups of 32."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((16, 1024), np.float32)
    losses = []
    for group_size in (32, 64, 128):
        weight = make_weight(rng, (256, 1024), pattern, "int8", group_size)
        y, exact = weight.pack().matmul(x), x.astype(np.float64) @ weight.dense.T
        losses.append(float(np.linalg.norm(y - exact) / np.linalg.norm(exact)))
    assert losses[0] < losses[1] < 0.012
    assert losses[2] < 0.012  # groups of 128 are quantised as two of 64


def test_ties_are_rounded_to_even() -> None:
    weight = make_weight(np.random.default_rng(6), (8, 8), "dense", "int8", 32)
    x = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantised(x, 32).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    matrix = weight.pack()
    for name in cpu.isas():
        cpu.use_isa(name)
        assert error(matrix.matmul(x), weight, matrix, x) < 1e-6
