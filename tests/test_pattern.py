"""Patterns against brute force."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from secateur.errors import UsageError
from secateur.pattern import Pattern


@pytest.mark.parametrize(
    ("text", "removed", "rows"),
    [
        ("dense", 0.0, 1),
        ("2:4", 0.5, 1),
        ("1:4", 0.75, 1),
        ("4:8", 0.5, 1),
        ("4:16", 0.75, 1),
        ("50%", 0.5, 1),
        ("62.5%", 0.625, 1),
        ("50%@8x1", 0.5, 8),
        ("2:4@16x1", 0.5, 16),
        ("30%@4x1", 0.3, 4),
    ],
)
def test_reads_and_writes_its_grammar(text: str, removed: float, rows: int) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(str(pattern)) == pattern
    assert float(pattern.removed) == pytest.approx(removed)
    assert pattern.rows == rows


@given(st.integers(1, 32), st.integers(1, 32), st.sampled_from(["", "@4x1", "@8x1", "@16x1"]))
def test_any_n_of_m_round_trips_or_is_refused(n: int, m: int, blocks: str) -> None:
    text = f"{n}:{m}{blocks}"
    if n < m:
        assert str(Pattern.parse(text)) == text
    else:
        with pytest.raises(UsageError, match="keeps"):
            Pattern.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2:4:8", "124", "4:2", "2:2", "0:4", "0%", "100%", "150%", "-5%", "2:4@3x1"),
        *("50%@8x2", "50@8x1", "Dense", "2:4@1x1", "half"),
    ],
)
def test_refuses_everything_else_with_a_way_out(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Pattern.parse(text)
    assert refusal.value.fix


def test_two_of_four_allows_exactly_the_six_masks() -> None:
    pattern = Pattern.parse("2:4")
    allowed = {tuple(i in pair for i in range(4)) for pair in combinations(range(4), 2)}
    for bits in product([False, True], repeat=4):
        mask = np.array([bits])
        if bits in allowed:
            pattern.check(mask)
        else:
            with pytest.raises(ValueError, match="keeps"):
                pattern.check(mask)


@given(st.integers(0, 2**12 - 1))
def test_blocks_must_be_whole(bits: int) -> None:
    mask = np.array([[bits >> (4 * 0 + j) & 1 for j in range(12)]], dtype=bool).repeat(4, axis=0)
    pattern = Pattern.parse("50%@4x1")
    if mask[0].sum() == 6:
        pattern.check(mask)
        torn = mask.copy()
        torn[2, 5] ^= True
        with pytest.raises(ValueError, match="row 0, column 5"):
            pattern.check(torn)
    else:
        with pytest.raises(ValueError, match="removed"):
            pattern.check(mask)


@pytest.mark.parametrize(
    ("text", "shape", "fits"),
    [
        ("2:4", (3, 8), True),
        ("2:4", (3, 6), False),
        ("50%", (3, 7), True),
        ("50%@8x1", (12, 7), False),
        ("50%@4x1", (12, 7), True),
        ("2:4@4x1", (12, 6), False),
    ],
)
def test_says_what_does_not_fit(text: str, shape: tuple[int, int], fits: bool) -> None:
    why = Pattern.parse(text).obstacle(*shape)
    assert (why is None) == fits
    if why is not None:
        with pytest.raises(ValueError, match="does not fit"):
            Pattern.parse(text).check(np.ones(shape, dtype=bool))


def test_check_takes_only_boolean_matrices() -> None:
    with pytest.raises(ValueError, match="boolean"):
        Pattern.parse("2:4").check(np.ones((2, 4)))
    with pytest.raises(ValueError, match="removed"):
        Pattern.parse("dense").check(np.zeros((2, 4), dtype=bool))
    Pattern.parse("dense").check(np.ones((2, 4), dtype=bool))


def test_lives_in_pydantic_models_as_its_text() -> None:
    class Holder(BaseModel):
        pattern: Pattern

    holder = Holder.model_validate({"pattern": "2:4"})
    assert holder.model_dump(mode="json") == {"pattern": "2:4"}
    assert Holder.model_validate_json(holder.model_dump_json()) == holder
    assert Holder.model_json_schema()["properties"]["pattern"]["type"] == "string"
