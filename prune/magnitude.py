"""Magnitude pruning: remove the smallest weights.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.

    score = |W|                                   W: [out, in]

``P%`` compares the weights of the whole layer, or of each row with ``magnitude.among=row``; N:M
those of each group.

Difference from the code that the Wanda paper compares with (`compat: reference` repeats it):
there ``P%`` removes every weight up to and including the threshold
``sorted(|W|)[int(numel P)]``, which is one weight too many, and with ties many too many.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.prune.masks import keep_highest
from secateur.prune.method import Method, Problem, Solution, masked
from secateur.recipe import Section


class Settings(Section):
    """Settings of `magnitude`."""

    among: Literal["layer", "row"] = Field("layer", description="What P% compares.")


def magnitude(problem: Problem, settings: Settings) -> Solution:
    """Keep the largest weights."""
    score = problem.weight.abs()
    pattern = problem.pattern
    whole = settings.among == "layer" and not pattern.is_nm and pattern.rows == 1
    if problem.compat == "reference" and whole:
        threshold = score.flatten().sort().values[pattern.removed_of(score.numel())]
        return masked(problem.weight, score > threshold)
    return masked(problem.weight, keep_highest(score, pattern, settings.among))


METHOD = Method(
    name="magnitude",
    summary="the smallest weights go; needs no data",
    source="Han et al. 2015, section 3",
    needs=frozenset(),
    function=magnitude,
    settings=Settings(),
)
