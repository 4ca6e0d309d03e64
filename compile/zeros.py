"""Which pattern the zeros of a weight have, where nothing says so."""

from __future__ import annotations

from fractions import Fraction

import torch

from secateur.compile.bitmask import nonzero
from secateur.pattern import BLOCK_HEIGHTS, Pattern

# A weight with fewer zeros than this was not pruned; quantising to 4 bits alone may make a few.
FEWEST = 0.2
# A kept weight may be 0, too, but so much of the zeros must be removed ones, and so much of what is
# kept must not be 0.
_MOST = 0.75
_WINDOWS = (4, 8, 16)


def pattern_of(weight: torch.Tensor) -> Pattern:
    """The narrowest pattern whose removed positions are all zero.

    Blocks are preferred to single rows, the highest first, and N:M to ``P%``; of several N:M the
    one that keeps least, with the smallest M (2:4, though it is also 4:8).

    Args:
        weight: ``[rows, columns]`` of any type; -0 is zero.

    Returns:
        ``dense`` if fewer than a fifth of the weights are zero.
    """
    kept = nonzero(weight).contiguous()
    zeros = 1 - float(kept.float().mean())
    if zeros < FEWEST:
        return Pattern()
    for height in (*sorted(BLOCK_HEIGHTS, reverse=True), 1):
        if len(kept) % height:
            continue
        blocks = kept.view(-1, height, kept.shape[1]).any(dim=1)
        removed = 1 - float(blocks.float().mean())
        if height > 1 and not _fits(removed, zeros):
            continue
        return _of_rows(blocks, zeros, height)
    raise AssertionError("single rows always fit")


def mask_of(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """A mask of the pattern that keeps all that is not zero.

    Args:
        weight: ``[rows, columns]``.
        pattern: of `pattern_of` for it. Where fewer weights of a group are not zero than N:M keeps,
            the leftmost zeros are kept with them.

    Returns:
        bool ``[rows, columns]``, True = kept.
    """
    kept = nonzero(weight)
    if pattern.is_dense:
        return torch.ones_like(kept)
    blocks = kept.view(-1, pattern.rows, kept.shape[1]).any(dim=1)
    if pattern.is_nm:
        missing = pattern.n - _counts(blocks, pattern.m)
        short = missing > 0
        groups = blocks.view(len(blocks), -1, pattern.m)
        free = ~groups[short]
        groups[short] |= free & (free.cumsum(dim=1) <= missing[short][:, None])
    return blocks.repeat_interleave(pattern.rows, dim=0)


def _counts(kept: torch.Tensor, window: int) -> torch.Tensor:
    """How many of each window of columns a mask keeps, uint8 ``[rows, columns / window]``."""
    counts = kept[:, 0::window].to(torch.uint8)
    for i in range(1, window):  # column by column: torch is slow at sums of few elements
        counts += kept[:, i::window].view(torch.uint8)
    return counts


def _of_rows(kept: torch.Tensor, zeros: float, height: int) -> Pattern:
    """The pattern of a mask of block rows, ``[rows / height, columns]``."""
    best = None
    for window in _WINDOWS:
        if kept.shape[1] % window:
            continue
        most = int(_counts(kept, window).max())
        removed = 1 - Fraction(most, window)
        narrower = best is None or removed > best.removed
        if 0 < most < window and _fits(float(removed), zeros) and narrower:
            best = Pattern(most, window, removed, height)
    if best is not None:
        return best
    share = Fraction(int((~kept).sum()), kept.numel())
    return Pattern(removed=_rounded(share, kept.shape[1]), rows=height)


def _fits(removed: float, zeros: float) -> bool:
    """Whether a pattern that removes so much explains so many zeros."""
    return removed >= _MOST * zeros and 1 - zeros >= _MOST * (1 - removed)


def _rounded(share: Fraction, columns: int) -> Fraction:
    """A share to as few decimals of a percent as name it to within a column, as `Pattern` asks."""
    for digits in range(12):
        hundred = 100 * 10**digits
        text = Fraction(min(round(share * hundred), hundred - 1), hundred)
        if text and abs(text - share) < Fraction(1, 2 * columns):
            return text
    raise AssertionError(f"{share} of {columns} columns")
