"""SLEB: one after the other, the block goes without which the model's loss is the lowest.

Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
Transformer Blocks", algorithm 1: every remaining block is left out in turn, and the loss on the
calibration text decides. The first and the last block stay.

All trials of a step go through the model together, each block being loaded once: a trial is the
hidden states of the model so far, and forks off where its block is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from secateur.prune.narrowed import Survey
from secateur.prune.structured import Budget, Choice, Spared, StructuredMethod


class Settings(Spared):
    """Settings of `sleb`."""

    first: int = Field(1, ge=0, description="Blocks at the beginning that stay as they are.")
    last: int = Field(1, ge=0, description="Blocks at the end that stay as they are.")
    sequences: int = Field(8, ge=1, description="Calibration sequences that are read.")


def sleb(
    survey: Survey, budget: Budget, settings: Settings, start: Choice | None
) -> Iterator[Choice]:
    """Remove blocks one by one; a `Choice` after each."""
    shape = start.shape if start else survey.model.original
    others = settings.others(len(shape.blocks))
    while shape.weights > budget.weights and len(shape.alive) > 1:
        losses = survey.losses_without(shape, others, settings.sequences)
        if not losses:
            break
        shape = shape.with_block(min(losses, key=lambda block: (losses[block], block)), None)
        yield Choice(shape, done=shape.weights <= budget.weights)
    yield Choice(shape)


METHOD = StructuredMethod(
    name="sleb",
    summary="shallower: block by block, the one goes whose absence the loss minds least",
    source="Song et al. 2024, algorithm 1",
    function=sleb,
    settings=Settings(),
    removes="blocks",
    needs=frozenset({"loss"}),
)
