"""``secateur bench packing``: what is timed is right, and the numbers hang together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from secateur.bench.packing import PackingSettings, measure_packing
from secateur.compile import cpu
from secateur.compile.gpu import sm80, sm90
from secateur.errors import SecateurError

SMALL = ["--shape", "64x256", "--rounds", "2", "--min-ms", "0.1"]


def test_the_numbers_hang_together(secateur_command: Callable[..., Any]) -> None:
    before = cpu.threads()
    ran = secateur_command("bench", "packing", *SMALL, "--values", "bf16,fp16,int8", "--json")
    assert ran.returncode == 0
    assert cpu.threads() == before
    result = json.loads(ran.stdout)
    assert result["schema"] == "secateur/bench-packing/1"
    rows = result["conversions"]
    ways = [("from dense", True), ("from packed", False), ("to dense", True)]
    expected = [(name, way, known) for name in ("sm80", "sm90") for way, known in ways]
    expected += [("torch", "from dense", False), ("torch", "to dense", False)]
    for values in ("bf16", "fp16", "int8"):
        own = [row for row in rows if row["values"] == values]
        assert [(r["name"], r["way"], r["speedup"] is not None) for r in own] == expected
        by = {(row["name"], row["way"]): row for row in own}
        for (name, way), row in by.items():
            samples = row["gb_per_s"]["samples"]
            assert row["median_gb_per_s"] == statistics.median(samples)
            if row["speedup"]:  # a ratio of sums of times: of sums of 1 / speed
                theirs = by["torch", way]["gb_per_s"]["samples"]
                ratio = sum(1 / x for x in theirs) / sum(1 / x for x in samples)
                assert row["speedup"]["value"] == pytest.approx(ratio), name


def test_a_table(secateur_command: Callable[..., Any]) -> None:
    ran = secateur_command("bench", "packing", *SMALL, "--values", "int8")
    assert ran.returncode == 0
    assert "from packed" in ran.stdout
    assert "64 x 256, 2:4" in ran.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shape", "100x256"], "rows"),
        (["--shape", "smollm2"], "more than one shape"),
        (["--values", "int4"], "values"),
    ],
)
def test_what_cannot_be_measured(
    secateur_command: Callable[..., Any], flags: list[str], said: str
) -> None:
    ran = secateur_command("bench", "packing", *flags)
    assert ran.returncode == 2
    assert said in ran.stderr


class Forgetful:
    """A layout that loses the last row."""

    def from_dense(self, weight: Any) -> Any:
        damaged = weight.copy()
        damaged[-1] = 0
        return sm80.from_dense(damaged)

    def from_pieces(self, pieces: Any) -> Any:
        return sm80.from_pieces(pieces)


def test_a_layout_that_changes_the_weight_is_not_timed() -> None:
    settings = PackingSettings(rows=64, columns=256, rounds=2, min_ms=0.1)
    with pytest.raises(SecateurError, match="the layout bad changes a weight of bf16"):
        measure_packing({"sm90": sm90, "bad": Forgetful()}, cpu, settings)
