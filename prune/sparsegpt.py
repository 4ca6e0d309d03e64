"""SparseGPT: remove weights column by column, and let the columns to the right make up for it.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", algorithm 1.

    H = G + λI,  UᵀU = H⁻¹ (U upper triangular),  λ = percdamp mean(diag G)     W: [out, in]
    for each column j, left to right:
        e = W_j / U_jj where j is removed, 0 where it is kept
        W_k -= e U_jk for all k >= j              (this makes W_j = 0 where j is removed)

Which weights go is decided by W_ij² / U_jj² on the weights as they then are: for ``P%`` once for
``blocksize`` columns and all rows together, for N:M at the first column of each group. In ``@Rx1``
patterns the scores of a block's R rows add up.

Differences from the authors' code:
- ``P%``: they remove everything up to and including a threshold, one weight too many in each
  block of columns (`compat: reference` repeats it); here the count over the layer is exact.
- Their H is 2/S G, the same up to a factor that cancels.
- The weight of a dead input becomes 0, as theirs; the others' λ does not depend on it.
- Where the factorisation fails, λ is raised, and the fact `damping_retries` says how often.
- ``blocksize`` is rounded down to a multiple of M, so that groups are never torn.
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.gram import inverse_factor
from secateur.pattern import Pattern
from secateur.prune.masks import drop_lowest, keep_highest, per_block
from secateur.prune.method import GRAM, Method, Problem, Solution
from secateur.recipe import Section

try:
    from secateur.prune import _native
except ImportError:  # installed without a C++ compiler
    _native = None  # type: ignore[assignment]


class Settings(Section):
    """Settings of `sparsegpt`."""

    blocksize: int = Field(128, ge=1, description="Columns that share one decision for P%.")
    percdamp: float = Field(0.01, ge=0, description="λ relative to the mean of G's diagonal.")


def sparsegpt(problem: Problem, settings: Settings) -> Solution:
    """Prune and update the weights in one pass from left to right."""
    pattern = problem.pattern
    weight = problem.weight.clone()
    dead = problem.gram.diagonal() <= 0
    weight[:, dead] = 0
    upper, retries = problem.statistics.derived(
        ("inverse_factor", settings.percdamp),
        lambda: inverse_factor(problem.gram, settings.percdamp),
    )
    mask = torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    step = max(1, settings.blocksize // (pattern.m or 1)) * (pattern.m or 1)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block, kept = weight[:, start:stop], mask[:, start:stop]
        factor = upper[start:stop, start:stop]
        if not pattern.is_nm:
            kept.copy_(_choose(block / factor.diagonal(), problem, start))
        errors = _compensate(block, kept, factor, pattern)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return Solution(mask, weight, {"damping_retries": retries, "dead_inputs": int(dead.sum())})


def _compensate(
    weight: torch.Tensor, kept: torch.Tensor, factor: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Go through a block of columns, in place; N:M chooses its mask on the way.

    Args:
        weight, kept: ``[out, width]``.
        factor: ``[width, width]``, U of these columns.

    Returns:
        e of each column, ``[out, width]``; 0 where the weight is kept.
    """
    if _native is not None and weight.device.type == "cpu":
        own, mask = weight.contiguous(), kept.contiguous()
        errors = torch.zeros_like(own)
        limits = pattern.n, pattern.m, pattern.rows, torch.get_num_threads()
        _native.compensate(own, mask, errors, factor.contiguous(), *limits)
        weight.copy_(own)
        kept.copy_(mask)
        return errors
    errors = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if pattern.is_nm and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            score = (weight[:, group] / factor.diagonal()[group]).square()
            kept[:, group] = keep_highest(score, pattern, among="row")
        error = weight[:, j].where(~kept[:, j], 0) / factor[j, j]
        weight[:, j:] -= error[:, None] * factor[j, j:]
        errors[:, j] = error
    weight.masked_fill_(~kept, 0)
    return errors


def _choose(scaled: torch.Tensor, problem: Problem, start: int) -> torch.Tensor:
    """Which weights of a block of columns ``P%`` keeps, given W / U_jj."""
    pattern = problem.pattern
    score = per_block(scaled.square(), pattern)
    rows, width = score.shape
    if problem.compat == "reference":
        threshold = score.flatten().sort().values[pattern.removed_of(score.numel())]
        kept = score > threshold
    else:  # what all columns up to here remove, less what those before this block did
        count = pattern.removed_of(rows * (start + width)) - pattern.removed_of(rows * start)
        kept = drop_lowest(score.reshape(1, -1), count).reshape(score.shape)
    return kept.repeat_interleave(pattern.rows, dim=0)


METHOD = Method(
    name="sparsegpt",
    summary="column by column, the rest of each row makes up for what goes",
    source="Frantar and Alistarh 2023, algorithm 1",
    needs=GRAM,
    function=sparsegpt,
    settings=Settings(),
    workspace=(16, 24),
)
