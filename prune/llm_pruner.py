"""LLM-Pruner: in one step, the heads and channels with the lowest Taylor scores of each block.

Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", section 3. All
blocks but the first and last few lose the same part; of a KV group's or a channel's score see
`secateur.prune.taylor`. KV groups go whole, as far as the part covers them, so where heads are few
the MLPs bear more than their share; the part is such that the model has the size asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from secateur.prune.narrowed import Survey
from secateur.prune.shape import Shape
from secateur.prune.structured import (
    Budget,
    Choice,
    Spared,
    StructuredMethod,
    cut_to,
    largest_within,
)
from secateur.prune.taylor import Order


class Settings(Spared):
    """Settings of `llm-pruner`; sparing 4 and 2 blocks is the authors' choice for 32 blocks."""

    first: int = Field(4, ge=0, description="Blocks at the beginning that stay as they are.")
    last: int = Field(2, ge=0, description="Blocks at the end that stay as they are.")
    order: Order = Field("first", description="Taylor score: first, second, mixed or vector.")


def llm_pruner(
    survey: Survey, budget: Budget, settings: Settings, _: Choice | None
) -> Iterator[Choice]:
    """Remove the same part of every block that is not spared."""
    original = survey.model.original
    blocks = len(original.blocks)
    found = survey.taylor(original, settings.order)
    others = set(settings.others(blocks))

    def removed(part: float) -> list[float]:
        return [part if index in others else 0.0 for index in range(blocks)]

    def shape(part: float) -> Shape:
        return cut_to(
            original, original, found.groups, found.channels, removed(part), budget.multiple
        )

    part, final = largest_within(budget, shape)
    yield Choice(final, tuple(removed(part)))


METHOD = StructuredMethod(
    name="llm-pruner",
    summary="narrower: heads and channels go by Taylor score, the same part of every block",
    source="Ma et al. 2023, section 3",
    function=llm_pruner,
    settings=Settings(),
)
