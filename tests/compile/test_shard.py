"""Parts of packed linears, against the same parts of the dense weight."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.compile import cpu
from secateur.compile.config import PackedLayer
from secateur.compile.shard import alike, cut, dense, join, own
from secateur.compile.stored import Pieces
from tests.compile.cpu_reference import TYPES, Weight, draw_mask, make_weight

PATTERNS = ["dense", "2:4", "4:8", "1:4", "50%", "2:4@16x1", "50%@4x1"]


def stored(weight: Weight) -> Pieces:
    """The weight as it is read from a file."""
    counts = weight.mask.sum(axis=1)
    per_row = int(counts[0]) if (counts == counts[0]).all() else None
    layer = PackedLayer(
        pattern=weight.pattern,
        shape=weight.shape,
        kept=int(counts.sum()),
        per_row=per_row,
    )
    values = weight.values
    if per_row is not None and weight.value_type != "int4":
        values = values.reshape(weight.shape[0], per_row)
    size = weight.group_size
    return Pieces(layer, weight.bitmask, values, weight.scales, weight.value_type, size)


def places(draw: st.DrawFn, of: int, step: int) -> range:
    edges = st.integers(0, of // step)
    ends = sorted(draw(st.lists(edges, min_size=2, max_size=2, unique=True)))
    return range(ends[0] * step, ends[1] * step)


@st.composite
def weights(draw: st.DrawFn, pattern: str, value_type: cpu.Values) -> Weight:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    small = make_weight(rng, (16, 16), pattern, value_type).pattern
    step, window = small.rows, small.m or 1
    shape = draw(st.integers(1, 24 // step)) * step, draw(st.integers(1, 300 // window)) * window
    size = draw(st.sampled_from([32, 64, 128]))
    return make_weight(rng, shape, pattern, value_type, size)


def equal(found: Pieces, expected: Pieces) -> None:
    assert found.layer == expected.layer
    assert (found.value_type, found.group_size) == (expected.value_type, expected.group_size)
    for name in ("bitmask", "values", "scales"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert one.tobytes() == other.tobytes(), name


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_cut_is_that_of_the_dense_weight(
    pattern: str, value_type: cpu.Values, data: st.DataObject
) -> None:
    weight = data.draw(weights(pattern, value_type))
    window = 32 if weight.scales is not None else weight.pattern.m or 1
    assume(weight.shape[1] >= window)
    rows = places(data.draw, weight.shape[0], weight.pattern.rows)
    columns = places(data.draw, weight.shape[1], window)
    part = cut(stored(weight), rows, columns)
    here = np.ix_(list(rows), list(columns))
    assert np.array_equal(dense(part), weight.dense[here])
    # It is what would be stored of the cut weight; with other groups, if it begins inside one.
    layer = part.layer
    assert layer.shape == (len(rows), len(columns))
    assert layer.kept == weight.mask[here].sum()
    if part.bitmask is not None:
        assert part.bitmask.shape == layer.bitmask_shape
        assert np.array_equal(
            np.unpackbits(part.bitmask, axis=1, count=len(columns), bitorder="little"),
            weight.mask[here][:: weight.pattern.rows],
        )
    count = -(-layer.kept // 2)
    assert part.values.shape == ((count,) if value_type == "int4" else layer.values_shape)
    if part.scales is not None and part.group_size is not None:
        assert part.scales.shape == (len(rows), -(-len(columns) // part.group_size))
    packed = cpu.pack(
        part.values,
        part.bitmask,
        layer.shape,
        layer.pattern,
        value_type,
        scales=part.scales,
        group_size=part.group_size,
        layout="dense",
    )
    assert np.array_equal(packed.decode(), weight.dense[here])


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cuts_of_rows_join_to_the_whole(
    pattern: str, value_type: cpu.Values, data: st.DataObject
) -> None:
    weight = data.draw(weights(pattern, value_type))
    step = weight.pattern.rows
    inner = data.draw(st.sets(st.integers(1, max(1, weight.shape[0] // step - 1))))
    edges = sorted({0, weight.shape[0], *(i * step for i in inner if i * step < weight.shape[0])})
    whole = stored(weight)
    columns = range(weight.shape[1])
    parts = [cut(whole, range(a, b), columns) for a, b in pairwise(edges)]
    assert alike(parts)
    equal(join(parts), whole)


def test_only_what_one_layout_holds_is_alike() -> None:
    rng = np.random.default_rng(0)

    def make(pattern: str, value_type: cpu.Values = "bf16", columns: int = 64) -> Pieces:
        return stored(make_weight(rng, (16, columns), pattern, value_type))

    first = make("2:4")
    for other in (make("4:8"), make("2:4", "fp16"), make("dense"), make("2:4", columns=128)):
        assert not alike([first, other])
    assert not alike([make("2:4@16x1"), first])
    # Each layer has its own share of removed weights: one layout holds them all the same.
    parts = [make("50%"), make("30%")]
    assert alike(parts)
    assert np.array_equal(dense(join(parts)), np.concatenate([dense(part) for part in parts]))


@settings(max_examples=200, deadline=None)
@given(heads=st.integers(1, 12), size=st.integers(1, 8), ranks=st.integers(1, 12))
def test_every_process_has_its_own(heads: int, size: int, ranks: int) -> None:
    """Heads are dealt in turn; where there are fewer than processes, neighbours share one."""
    assume(heads % ranks == 0 or ranks % heads == 0)
    each = max(1, heads // ranks)
    dealt = sorted(list(range(heads)) * max(1, ranks // heads))  # which head, process by process
    for rank in range(ranks):
        rows = own(heads * size, each * size, rank, ranks)
        expected = dealt[rank * each : (rank + 1) * each]
        assert [row // size for row in rows] == [head for head in expected for _ in range(size)]
        assert [row % size for row in rows] == list(range(size)) * each


@pytest.mark.parametrize(
    ("pattern", "rows", "columns", "said"),
    [
        ("2:4", range(16), range(2, 64), "from column 2 to 64 goes through the groups of 4"),
        ("2:4", range(16), range(62), "from column 0 to 62"),
        ("50%@8x1", range(4, 16), range(64), "from row 4 to 16 goes through the groups of 8"),
        ("50%", range(16), range(16, 64), "column 16 goes through a group of 64"),
    ],
)
def test_cuts_that_cannot_be(pattern: str, rows: range, columns: range, said: str) -> None:
    weight = make_weight(np.random.default_rng(0), (16, 64), pattern, "int8")
    with pytest.raises(ValueError, match=said):
        cut(stored(weight), rows, columns)


def test_a_finer_group_repeats_its_scale() -> None:
    rng: Any = np.random.default_rng(0)
    shape = (4, 320)
    mask = draw_mask(rng, shape, make_weight(rng, (4, 4), "50%", "int8").pattern)
    weight = make_weight(rng, shape, "50%", "int8", 128, mask)
    part = cut(stored(weight), range(4), range(192, 320))
    assert part.group_size == 64
    assert weight.scales is not None
    assert part.scales is not None
    assert np.array_equal(part.scales, weight.scales[:, [1, 2]])
