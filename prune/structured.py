"""What a structured method is: heads, channels or blocks go, and the matrices become smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from pydantic import Field

from secateur.errors import UsageError
from secateur.prune.narrowed import Survey
from secateur.prune.shape import Kept, Shape
from secateur.recipe import Section


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may stay.

    Attributes:
        weights: of all linears in blocks, at most.
        multiple: widths of MLPs are multiples of this.
    """

    weights: int
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """What a structured method has decided so far.

    Attributes:
        shape: what is kept.
        removed: of each block, the part that the method's schedule has removed; methods without
            one leave it empty.
        done: whether that is the final choice.
        facts: counts of anything unusual, for the manifest.
    """

    shape: Shape
    removed: tuple[float, ...] = ()
    done: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StructuredMethod:
    """A named way to make a model smaller.

    Attributes:
        summary: one line for `secateur methods`.
        source: paper, and equation or section.
        function: yields a `Choice` after each step of the method; given the last one of an
            earlier run it goes on from there.
        settings: a frozen pydantic model.
        removes: "widths": heads and channels; "blocks": whole blocks.
    """

    name: str
    summary: str
    source: str
    function: Callable[[Survey, Budget, Any, Choice | None], Iterator[Choice]]
    settings: Any
    removes: str = "widths"
    needs: frozenset[str] = frozenset({"gradients"})


class Spared(Section):
    """Settings of methods that leave blocks at the ends of the model alone."""

    first: int = Field(0, ge=0, description="Blocks at the beginning that stay as they are.")
    last: int = Field(0, ge=0, description="Blocks at the end that stay as they are.")

    def others(self, blocks: int) -> list[int]:
        """The blocks that may change."""
        return list(range(self.first, blocks - self.last))


def width(initial: int, removed: float, multiple: int) -> int:
    """How many of ``initial`` units stay; at least one ``multiple`` of them does.

    Whole multiples go, as far as the part ``removed`` covers them: of three heads one goes at a
    third, not before.
    """
    multiples = ceil(initial * (1 - removed) / multiple - 1e-9)
    return min(initial, max(multiples, 1) * multiple)


def highest(scores: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` of ``numbers`` with the highest scores, ascending; ties go to the lower."""
    order = scores.argsort(descending=True, stable=True)
    return numbers[order[:count].sort().values]


def cut_to(
    shape: Shape,
    original: Shape,
    groups: Sequence[torch.Tensor],
    channels: Sequence[torch.Tensor],
    removed: Sequence[float],
    multiple: int,
) -> Shape:
    """A shape of which each block loses its lowest units, down to a part of the original.

    Args:
        shape: what is kept now.
        groups, channels: scores of its units.
        removed: of each block, the part of the original that is to go.
    """
    blocks: list[Kept | None] = []
    for number, (now, full) in enumerate(zip(shape.blocks, original.blocks, strict=True)):
        assert now is not None
        assert full is not None
        few = min(len(now.groups), width(len(full.groups), removed[number], 1))
        some = min(len(now.channels), width(len(full.channels), removed[number], multiple))
        kept = highest(groups[number], now.groups, few)
        blocks.append(Kept(kept, highest(channels[number], now.channels, some)))
    return replace(shape, blocks=tuple(blocks))


def largest_within(budget: Budget, at: Callable[[float], Shape]) -> tuple[float, Shape]:
    """The least t in [0, 1] whose shape is within the budget, where ``at`` shrinks with t.

    Raises:
        UsageError: not even t = 1 is.
    """
    if (least := at(1.0)).weights > budget.weights:
        raise UsageError(
            f"{least.weights:,} weights stay at the least, and {budget.weights:,} are asked for",
            "remove less, spare fewer blocks, or choose a smaller multiple",
        )
    low, high, best = 0.0, 1.0, least
    for _ in range(30):
        middle = (low + high) / 2
        shape = at(middle)
        low, high = (low, middle) if shape.weights <= budget.weights else (middle, high)
        best = shape if high == middle else best
    return high, best
