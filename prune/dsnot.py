"""DSnoT: exchange weights until the expected output of each row is that of the dense layer.

Zhang et al. 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
eq. 3 to 6.

    e = Σ_j (W_j - x_j) μ_j                       W: [out, in]; x: the weights now, μ = E[X]
    at most ``cycles`` times in each row, while |e| > threshold:
        u = the removed weight of largest sign(e) W_u μ_u / Var[X_u]
        p = the kept weight of smallest |x_p| ‖X_p‖ with sign(e) x_p μ_p < 0
            N:M: in u's group, whatever its sign
        x_u = W_u, x_p = 0, e = e + x_p μ_p - W_u μ_u

Each weight moves at most once. In ``@Rx1`` patterns the R rows of a block move together, and the
three scores are sums over them.

The expectation says nothing about the variance, so the true error ‖(W - x)X‖² of a row may well
grow. Differences from the authors' code, which is in `dsnot_reference` (`compat: reference`):
- A row whose true error grew, by the Gram matrix, gets its old mask back (fact `rows_reverted`).
- An exchange must lower |e|; else u is passed over. So N:M never runs out of its group, and a row
  without a candidate just stops.
- μ and Var are over all tokens, and a variance is never taken for less than a millionth of the
  mean one: a dead input is no candidate, and nothing is divided by 0.
- The threshold is on the expectation per token, not summed over a sequence. By default it is 0.1
  over 2048 tokens, the authors' sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.gram import row_errors
from secateur.prune.dsnot_reference import dsnot_reference
from secateur.prune.masks import row_chunks
from secateur.prune.method import Problem, Refinement, Solution
from secateur.recipe import Section
from secateur.statistics import InputStatistics


class Settings(Section):
    """Settings of `dsnot`."""

    cycles: int = Field(50, ge=1, description="Exchanges at most, in each row.")
    threshold: float | None = Field(
        None,
        ge=0,
        description="A row is done when its expected error is below this; per token (default "
        "0.1 / 2048), in compat reference summed over a sequence (default 0.1).",
    )
    same_sign: bool = Field(False, description="No exchange may change the error's sign.")
    metric: Literal["wanda", "magnitude"] = Field(
        "wanda",
        description="What N:M prunes by in compat reference: the score of the mask's method.",
    )


def dsnot(problem: Problem, solution: Solution, settings: Settings) -> Solution:
    """Exchange weights, then take back what made the true error grow."""
    if problem.compat == "reference":
        return dsnot_reference(
            problem,
            solution,
            settings.cycles,
            0.1 if settings.threshold is None else settings.threshold,
            settings.same_sign,
            settings.metric,
        )
    pattern, columns = problem.pattern, problem.weight.shape[1]
    mask, weight = solution.mask.clone(), solution.weight.clone()
    made = reverted = 0
    for chunk in row_chunks(len(weight), 8 * 4 * columns, pattern):
        shape = (-1, pattern.rows, columns)
        target, before = problem.weight[chunk].view(shape), weight[chunk].view(shape)
        kept = mask[chunk].view(shape)[:, 0]
        after, swapped, count = _exchange(
            target, before, kept, problem.statistics, pattern.m, settings
        )
        worse = _errors(target - after, problem) > _errors(target - before, problem)
        now = before.where(worse[:, None, None], after)
        kept = kept.where(worse[:, None], swapped)
        weight[chunk] = now.view(-1, columns)
        mask[chunk] = kept.repeat_interleave(pattern.rows, dim=0)
        made += int(count[~worse].sum())
        reverted += int(worse.sum()) * pattern.rows
    return Solution(mask, weight, {"swaps": made, "rows_reverted": reverted})


def _errors(change: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The true error of each block row: [B, R, in] to [B]."""
    return row_errors(change.flatten(0, 1), problem.gram).view(change.shape[:2]).sum(dim=1)


def _exchange(
    target: torch.Tensor,
    before: torch.Tensor,
    kept: torch.Tensor,
    inputs: InputStatistics,
    m: int,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All cycles on some block rows.

    Args:
        target, before: W and x, [B, R, in].
        kept: [B, in].
        m: M of N:M, or 0.

    Returns:
        The new x and mask, and the number of exchanges of each block row.
    """
    mean, norm = inputs.mean, inputs.square_norm.sqrt()
    variance = inputs.variance
    variance = variance.clamp_min(1e-6 * float(variance.mean()) + 1e-30)
    threshold = 0.1 / 2048 if settings.threshold is None else settings.threshold
    now, kept = before.clone(), kept.clone()
    may_return, may_leave = ~kept, kept.clone()
    error = ((target - now) * mean).sum(dim=2)  # e, [B, R]
    made = torch.zeros(len(now), dtype=torch.int64, device=now.device)
    active = torch.ones(len(now), 1, dtype=torch.bool, device=now.device)
    for _ in range(settings.cycles):
        active = active & (error.abs().mean(dim=1, keepdim=True) > threshold)
        side = error.sign()[:, :, None]
        lift = (side * target * mean).sum(dim=1)
        allowed = may_return & (lift > 0)
        if m:
            allowed = allowed & may_leave.view(len(kept), -1, m).any(dim=2).repeat_interleave(m, 1)
        score, back = (lift / variance).masked_fill(~allowed, -torch.inf).max(dim=1, keepdim=True)
        cost = (now.abs() * norm).sum(dim=1)
        if m:
            columns = torch.arange(kept.shape[1], device=now.device)
            allowed = may_leave & (columns // m == back // m)
        else:
            allowed = may_leave & ((side * now * mean).sum(dim=1) < 0)
        least, out = cost.masked_fill(~allowed, torch.inf).min(dim=1, keepdim=True)
        active = active & score.isfinite() & least.isfinite()
        if not active.any():
            break
        back_wide, out_wide = (at[:, None].expand(-1, now.shape[1], -1) for at in (back, out))
        new, old = target.gather(2, back_wide), now.gather(2, out_wide)
        after = error + (old * mean[out][:, None] - new * mean[back][:, None])[:, :, 0]
        swap = active & (after.abs().sum(1, keepdim=True) < error.abs().sum(1, keepdim=True))
        if settings.same_sign:
            swap &= (after * side[:, :, 0]).sum(dim=1, keepdim=True) >= 0
        # Rows that stand still write back what is there.
        now.scatter_(2, back_wide, new.where(swap[:, None], now.gather(2, back_wide)))
        now.scatter_(2, out_wide, old.where(~swap[:, None], 0))
        kept.scatter_(1, back, kept.gather(1, back) | swap)
        kept.scatter_(1, out, kept.gather(1, out) & ~swap)
        may_leave.scatter_(1, out, may_leave.gather(1, out) & ~swap)
        may_return.scatter_(1, back, may_return.gather(1, back) & ~active)
        error = after.where(swap, error)
        made += swap[:, 0]
    return now, kept, made


REFINEMENT = Refinement(
    name="dsnot",
    summary="exchanges weights until each row's expected output is that of the dense layer",
    source="Zhang et al. 2024, eq. 3 to 6",
    needs=frozenset({"norms", "moments", "gram"}),
    function=dsnot,
    settings=Settings(),
)
