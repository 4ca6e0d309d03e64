"""The search: which point it calls best, what is on the front, and one on a real tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.bench.tune import Point, Speed, Target, find_front
from secateur.errors import UsageError
from secateur.recipe import load_recipe
from tests.bench.reporting import estimate

RATIOS = st.sampled_from([0.9, 1.0, 1.2, 1.5, 2.0])


def point(name: str, speedup: float, size: int, ratio: float | None) -> Point:
    speed = Speed(
        decode_speedup=estimate(speedup),
        prefill_speedup=estimate(1.0),
        bytes=size,
        dense_bytes=10,
    )
    quality = None if ratio is None else estimate(ratio)
    return Point(pattern=name, values="bf16", method="m", speed=speed, perplexity_ratio=quality)


POINTS = st.lists(st.tuples(RATIOS, st.integers(1, 3), RATIOS | st.none()), max_size=8).map(
    lambda rows: [point(str(i), *row) for i, row in enumerate(rows)]
)


@settings(max_examples=100, deadline=None)
@given(points=POINTS, limit=RATIOS)
def test_the_best_keeps_the_limit_and_none_that_does_is_better(
    points: list[Point], limit: float
) -> None:
    facts = {
        one.pattern: (one.speed.decode_speedup.value, one.perplexity_ratio.value)
        for one in points
        if one.speed and one.perplexity_ratio
    }
    fast = Target(speedup=limit).best(points)
    able = [ratio for speed, ratio in facts.values() if speed >= limit]
    assert (fast is None) == (not able)
    if fast is not None:
        assert facts[fast.pattern][0] >= limit
        assert facts[fast.pattern][1] == min(able)
    good = Target(increase=limit).best(points)
    quick = [speed for speed, ratio in facts.values() if ratio <= 1 + limit]
    assert (good is None) == (not quick)
    if good is not None:
        assert facts[good.pattern][1] <= 1 + limit
        assert facts[good.pattern][0] == max(quick)
    front = {one.pattern for one in find_front(points)}
    for name in facts:
        mine = next(one for one in points if one.pattern == name)
        beaten = any(beats(other, mine) for other in points)
        assert (name in front) == (not beaten)


def beats(other: Point, mine: Point) -> bool:
    if not (other.speed and other.perplexity_ratio and mine.speed and mine.perplexity_ratio):
        return False
    better = [
        other.speed.decode_speedup.value - mine.speed.decode_speedup.value,
        mine.speed.bytes - other.speed.bytes,
        mine.perplexity_ratio.value - other.perplexity_ratio.value,
    ]
    return all(gain >= 0 for gain in better) and any(gain > 0 for gain in better)


def test_one_target_is_asked_for() -> None:
    for given_ in ({}, {"speedup": 1.0, "increase": 0.1}, {"speedup": -1.0}):
        with pytest.raises(UsageError):
            Target(**given_)


def test_a_search_writes_a_recipe_and_goes_on_where_it_stopped(
    tiny: Path, tmp_path: Path, secateur_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--patterns", "2:4,1:4", "--values", "bf16", "--methods", "magnitude"]
    small += ["--data", "pydoc", "--samples", "2", "--length", "32", "--window", "32"]
    small += ["--windows", "2", "--prompt", "8", "--new-tokens", "4"]
    asked = ["tune", str(tiny), "--max-ppl-increase", "100000%", *small, "--json"]
    stopped = secateur_command(*asked, "--budget", "0s")
    assert stopped.returncode == 5
    assert "none was measured" in json.loads(stopped.stdout)["error"]["message"]

    result = json.loads(secateur_command(*asked).stdout)
    assert result["finished"]
    found = {(one["pattern"], one["values"]): one for one in result["points"]}
    assert set(found) == {("2:4", "bf16"), ("1:4", "bf16")}
    assert found["1:4", "bf16"]["speed"]["bytes"] < found["2:4", "bf16"]["speed"]["bytes"]
    chosen = load_recipe("recipe.yaml")
    best = result["best"]
    assert (str(chosen.prune.pattern), chosen.compile.values) == (best["pattern"], best["values"])
    assert yaml.safe_load(Path("recipe.yaml").read_text()) == result["recipe"]
    assert not list(Path("tune.work").glob("p*ed*/"))

    kept = {file.name: file.stat().st_mtime_ns for file in Path("tune.work").iterdir()}
    again = secateur_command(*asked)
    assert json.loads(again.stdout)["points"] == result["points"]
    assert {file.name: file.stat().st_mtime_ns for file in Path("tune.work").iterdir()} == kept

    ran = secateur_command("tune", str(tiny), "--target-speedup", "1e6", *small)
    assert ran.returncode == 5
    assert "nothing that was tried keeps a speed-up of 1e+06: the fastest has" in ran.stderr
