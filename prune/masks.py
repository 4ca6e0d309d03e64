"""From scores to masks: keep the weights with the highest scores that the pattern allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from secateur.pattern import Pattern

# What one chunk of rows may take where a method needs several copies of it.
_CHUNK_BYTES = 1 << 28
# Rows up to this length are sorted to find their lowest.
_SHORT = 64


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
    blocks = per_block(score, pattern)
    if pattern.is_nm:
        kept = drop_lowest(blocks.reshape(-1, pattern.m), pattern.m - pattern.n)
    elif among == "row":
        kept = drop_lowest(blocks, pattern.removed_of(blocks.shape[1]))
    else:
        kept = drop_lowest(blocks.reshape(1, -1), pattern.removed_of(blocks.numel()))
    return kept.reshape(blocks.shape).repeat_interleave(pattern.rows, dim=0)


def drop_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """In each row of ``scores``, False at the ``count`` lowest and True elsewhere."""
    import torch

    kept = torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return kept
    if scores.shape[1] <= _SHORT:
        order = scores.argsort(dim=1, stable=True)
        return kept.scatter_(1, order[:, :count], False)
    # The same without sorting: all below the threshold, then of its equals the first.
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(dim=1) <= missing)))


def per_block(values: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Sums over the R rows of each block: ``[out, in]`` to ``[out / R, in]``."""
    if pattern.rows == 1:
        return values
    return values.reshape(-1, pattern.rows, values.shape[1]).sum(dim=1)


def row_chunks(rows: int, row_bytes: int, pattern: Pattern) -> Iterator[slice]:
    """Split rows into slices of whole blocks, each of at most a quarter GiB.

    Args:
        row_bytes: size of what is chunked, per row.
    """
    step = max(1, _CHUNK_BYTES // max(1, row_bytes) // pattern.rows) * pattern.rows
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
