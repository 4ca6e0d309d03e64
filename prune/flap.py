"""FLAP: heads and channels whose contribution hardly varies go, wherever in the model they are.

An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", eq. 4 to
6. Of input j of o_proj or down_proj, with the moments of the dense model's activations:

    score_j = Var(x_j) Σ_i W_ij²

The score of a KV group is the mean over the inputs that its query heads make. Scores are
standardised within each block, groups and channels apart, and the lowest of the whole model go;
every block keeps at least one group and the least width of an MLP. What varies little is nearly a
constant, so a bias makes up for it: the paper's method is ``flap+bias``.

Differences from the authors' code: there the running mean is updated before it is used, which
falsifies the variance; a head always counts as 512/3 channels, here as the weights it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from secateur.prune.narrowed import Survey
from secateur.prune.shape import Kept, Shape
from secateur.prune.structured import (
    Budget,
    Choice,
    StructuredMethod,
    highest,
    largest_within,
    width,
)
from secateur.recipe import Section


class Settings(Section):
    """`flap` has no settings."""


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores less their mean, in units of their standard deviation."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-30)


def flap(survey: Survey, budget: Budget, settings: Settings, _: Choice | None) -> Iterator[Choice]:
    """Remove the units with the lowest standardised fluctuation."""
    model, original = survey.model, survey.model.original
    parts = model.parts
    groups, channels = [], []
    for index, moments in enumerate(survey.inputs_of([parts.output, parts.down])):
        prefix = model.block_prefix(index)
        score = {
            name: moments[name].variance.cpu()
            * model.checkpoint.load(f"{prefix}{name}.weight").float().square().sum(dim=0)
            for name in moments
        }
        per_group = score[parts.output].view(-1, original.rep * original.head_dim).mean(dim=1)
        groups.append(standardised(per_group))
        channels.append(standardised(score[parts.down]))
    yield Choice(lowest_removed(original, groups, channels, budget))


def lowest_removed(
    original: Shape, groups: list[torch.Tensor], channels: list[torch.Tensor], budget: Budget
) -> Shape:
    """The shape after the lowest scores of all blocks went, as many as the budget asks for."""
    ascending = torch.cat([*groups, *channels]).sort().values

    def shape(part: float) -> Shape:
        number = int(part * len(ascending))
        least = ascending[number] if number < len(ascending) else torch.inf
        blocks: list[Kept | None] = []
        for own, kept in zip(zip(groups, channels, strict=True), original.blocks, strict=True):
            assert kept is not None
            few, some = (1 - float((scores >= least).float().mean()) for scores in own)
            heads = highest(own[0], kept.groups, width(len(own[0]), few, 1))
            wide = width(len(own[1]), some, budget.multiple)
            blocks.append(Kept(heads, highest(own[1], kept.channels, wide)))
        return replace(original, blocks=tuple(blocks))

    return largest_within(budget, shape)[1]


METHOD = StructuredMethod(
    name="flap",
    summary="narrower: heads and channels whose contribution varies least go, wherever they are",
    source="An et al. 2024, eq. 4 to 6",
    function=flap,
    settings=Settings(),
    needs=frozenset({"moments"}),
)
