"""Adapt-Pruner: blocks that change their input little lose more, a little at a time.

Wang et al. 2025, "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model
Training", section 3.

    I_l = - mean over tokens of cos(x_l, x_(l+1))           x_l: what goes into block l
    Ĩ_l = (I_l - mean I) / max |I - mean I|                 in [-1, 1], mean 0
    s_l ← clamp(s_l + step - A Ĩ_l, 0, 0.99)                part of block l that is gone

In every step, on other calibration sequences than the last, the units with the lowest Taylor scores
(`secateur.prune.taylor`) of each block go until 1 - s_l of it is left: KV groups with all their
query heads, and MLP channels. The steps end when the model is small enough; the last one is
shortened so that it is not smaller than that.

Differences from the authors' code: they add s_l up over 50 steps of 2 %, stop after the first step
below the target and so overshoot; MLPs have any width there. `compat: reference` pools query heads
as they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field

from secateur.errors import UsageError
from secateur.prune.narrowed import Scores, Survey
from secateur.prune.shape import Shape
from secateur.prune.structured import (
    Budget,
    Choice,
    StructuredMethod,
    cut_to,
    largest_within,
)
from secateur.prune.taylor import Order
from secateur.recipe import Section

Scale = Literal["range", "rank"]
_MOST = 0.99


class Settings(Section):
    """Settings of `adapt`."""

    step: float = Field(0.02, gt=0, le=1, description="Part of the original that a step removes.")
    amplitude: float = Field(
        0.02, ge=0, description="A: how much more the least important block loses in a step."
    )
    sequences: int = Field(8, ge=1, description="Calibration sequences that a step reads.")
    scale: Scale = Field(
        "range", description="Of importances: 'range', the paper's, or 'rank': evenly spread."
    )
    order: Order = Field("first", description="Taylor score: first, second, mixed or vector.")


def importance(similarity: Sequence[float], scale: Scale = "range") -> torch.Tensor:
    """Ĩ: importance of blocks from the cosines between their inputs and outputs, ``[blocks]``."""
    negative = -torch.tensor(similarity, dtype=torch.float64)
    if scale == "rank":
        negative = negative.argsort().argsort().double()
    centred = negative - negative.mean()
    return centred / centred.abs().max().clamp_min(1e-30)


def next_removed(
    removed: Sequence[float], importance: torch.Tensor, step: float, amplitude: float
) -> list[float]:
    """s_l after one more step."""
    last = torch.tensor(removed, dtype=torch.float64)
    changed = (last + step - amplitude * importance).clamp(0, _MOST)
    return [float(value) for value in changed]


def adapt(
    survey: Survey, budget: Budget, settings: Settings, start: Choice | None
) -> Iterator[Choice]:
    """Remove heads and channels step by step; a `Choice` after each."""
    original = survey.model.original
    blocks = len(original.blocks)
    choice = start or Choice(original, (0.0,) * blocks, done=False, facts={"steps": 0})
    while not choice.done:
        number = int(choice.facts["steps"])
        if number * settings.step > blocks:
            raise UsageError(
                f"after {number} steps there are {choice.shape.weights:,} weights, and "
                f"{budget.weights:,} are asked for",
                "remove less, or choose a smaller amplitude or multiple",
            )
        reads = [
            (number * settings.sequences + i) % survey.samples
            for i in range(min(settings.sequences, survey.samples))
        ]
        found = survey.taylor(choice.shape, settings.order, reads)
        after = next_removed(
            choice.removed,
            importance(found.similarity, settings.scale),
            settings.step,
            settings.amplitude,
        )
        choice = _stepped(choice, after, found, original, budget)
        yield choice


def _stepped(
    choice: Choice, after: Sequence[float], found: Scores, original: Shape, budget: Budget
) -> Choice:
    """The choice after a step to the parts ``after``, or as much of it as the budget asks for."""

    def removed(t: float) -> tuple[float, ...]:
        return tuple(
            (1 - t) * old + t * new for old, new in zip(choice.removed, after, strict=True)
        )

    def shape(t: float) -> Shape:
        return cut_to(
            choice.shape, original, found.groups, found.channels, removed(t), budget.multiple
        )

    facts = {"steps": int(choice.facts["steps"]) + 1}
    whole = shape(1.0)
    if whole.weights > budget.weights:
        return Choice(whole, removed(1.0), done=False, facts=facts)
    part, final = largest_within(budget, shape)
    return Choice(final, removed(part), done=True, facts=facts)


METHOD = StructuredMethod(
    name="adapt",
    summary="narrower: heads and channels go by Taylor score, in small steps, more of them where "
    "a block changes its input little",
    source="Wang et al. 2025, section 3",
    function=adapt,
    settings=Settings(),
)
