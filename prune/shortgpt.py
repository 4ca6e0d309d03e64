"""ShortGPT: the blocks that change their input least go.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
eq. 1: block influence BI_l = 1 - mean over tokens of cos(x_l, x_(l+1)). As many blocks with the
lowest BI go at once as bring the model to the size asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from secateur.prune.narrowed import Survey
from secateur.prune.structured import Budget, Choice, Spared, StructuredMethod


class Settings(Spared):
    """Settings of `shortgpt`."""


def shortgpt(
    survey: Survey, budget: Budget, settings: Settings, _: Choice | None
) -> Iterator[Choice]:
    """Remove the least influential blocks."""
    shape = survey.model.original
    similarity = survey.similarity()
    others = settings.others(len(shape.blocks))
    for block in sorted(others, key=lambda index: -similarity[index]):
        if shape.weights <= budget.weights or len(shape.alive) == 1:
            break
        shape = shape.with_block(block, None)
    yield Choice(shape)


METHOD = StructuredMethod(
    name="shortgpt",
    summary="shallower: the blocks that change their input least go",
    source="Men et al. 2024, eq. 1",
    function=shortgpt,
    settings=Settings(),
    removes="blocks",
    needs=frozenset({"states"}),
)
