"""From scores to masks: keep the weights with the highest scores that the pattern allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from secateur.pattern import Pattern


def keep_highest(
    score: torch.Tensor, pattern: Pattern, among: Literal["row", "layer"]
) -> torch.Tensor:
    """The mask that removes the lowest scores.

    Counts are exact and round down; of equal scores the first in memory order goes first. In
    ``@Rx1`` patterns a block's score is the sum of its R scores.

    Args:
        score: ``[out, in]``.
        pattern: must fit the shape.
        among: whether ``P%`` removes P percent of each row or of the whole layer; N:M patterns
            choose within their groups either way.

    Returns:
        ``[out, in]`` bool, True = kept.
    """
    rows, columns = score.shape
    blocks = score.reshape(rows // pattern.rows, pattern.rows, columns).sum(dim=1)
    if pattern.is_nm:
        groups = blocks.reshape(-1, pattern.m)
        kept = _drop_lowest(groups, pattern.m - pattern.n)
    elif among == "row":
        kept = _drop_lowest(blocks, pattern.removed_of(columns))
    else:
        kept = _drop_lowest(blocks.reshape(1, -1), pattern.removed_of(blocks.numel()))
    return kept.reshape(blocks.shape).repeat_interleave(pattern.rows, dim=0)


def _drop_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """In each row of ``scores``, False at the ``count`` lowest."""
    order = scores.argsort(dim=1, stable=True)
    kept = scores == scores
    return kept.scatter_(1, order[:, :count], False)
