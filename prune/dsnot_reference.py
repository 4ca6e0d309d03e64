"""DSnoT as its authors' code computes it, for `compat: reference`.

What it does, beside what `dsnot` says:

    s = mean over sequences of Σ_tokens x (tokens times E[X]),  D = W s         W: [out, in]
    e = Σ D over the removed weights
    order R: all columns by (D where removed, else 0) / var, ascending
    order L: kept columns by Wanda's score; those with D < 0 in order from the front, those with
             D > 0 in reverse order from the end, index 0 between them for each D = 0

Both orders have a pointer at either end, and the sign of e picks the end: in R the last if e > 0,
in L the last if e < 0. Every row moves its pointers in every cycle; a row whose |e| fell to the
threshold stays out for good. With N:M the kept weight is the one with the lowest score in the group
of the weight that returns, each used once, and e may never change its sign.

Known faults, repeated here: in N:M a pointer may run past the removed weights of its sign, and
then kept ones are removed, so that the mask is no N:M mask any more (fact `rows_off_pattern`); a
dead input divides 0 by 0, which sorts last; the threshold grows with the sequence length. Where
their pointers leave the array (too many cycles for the row), they fail, and so does this.
"""

from __future__ import annotations

import torch

from secateur.errors import UsageError
from secateur.prune.method import Problem, Solution, masked


def dsnot_reference(
    problem: Problem,
    solution: Solution,
    cycles: int,
    threshold: float,
    same_sign: bool,
    metric: str,
) -> Solution:
    """The mask after all cycles; weights are the dense ones."""
    weight, pattern, inputs = problem.weight, problem.pattern, problem.statistics
    if pattern.rows > 1:
        raise UsageError(f"the authors' DSnoT code has no {pattern}", "drop --compat reference")
    removed = ~solution.mask
    size = weight.abs()
    score = size * inputs.square_norm.sqrt()
    if pattern.is_nm and metric == "magnitude":
        score = size
    product = weight * inputs.sequence_sum
    returning = product.masked_fill(solution.mask, 0.0)
    error = returning.sum(dim=-1, keepdim=True)
    sign = error.sign()
    returns = _Pointers((returning / inputs.within_variance).sort(dim=1, stable=True).indices)
    score = score.masked_fill(removed, torch.inf)
    leaves = None if pattern.is_nm else _Pointers(_leaving_order(score, product, removed))
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        if not active.any():
            break
        back = returns.take(error > 0)
        if leaves is not None:
            out = leaves.take(error < 0)
        else:
            group = back - back % pattern.m + torch.arange(pattern.m, device=back.device)
            # Not argmin: of a group without kept weights this takes the one that theirs takes.
            lowest = score.gather(1, group).topk(1, dim=1, largest=False).indices
            out = group.gather(1, lowest)
            score.scatter_(1, out, torch.inf)
        after = error + product.gather(1, out) - product.gather(1, back)
        active = active & (error.abs() > threshold)
        if same_sign or pattern.is_nm:
            active = active & (sign == after.sign())
        removed.scatter_(1, out, active)
        removed.scatter_(1, back, ~active)
        error = error + product.gather(1, out) * active - product.gather(1, back) * active
    result = masked(weight, ~removed)
    unit = (len(weight), -1, pattern.m or weight.shape[1])
    counts = [mask.reshape(unit).sum(dim=2) for mask in (result.mask, solution.mask)]
    lost = (counts[0] != counts[1]).any(dim=1).sum()
    return Solution(result.mask, result.weight, {"rows_off_pattern": int(lost)})


def _leaving_order(
    score: torch.Tensor, product: torch.Tensor, removed: torch.Tensor
) -> torch.Tensor:
    """Order L: [out, kept columns of a row]."""
    counts = (~removed).sum(dim=1)
    if (counts != counts[0]).any():
        raise UsageError(
            "the authors' DSnoT code needs rows of equal sparsity",
            "use a mask made row by row (wanda, magnitude.among=row), or drop --compat reference",
        )
    kept = int(counts[0])
    columns = score.sort(dim=1, stable=True).indices[:, :kept]
    signed = product.gather(1, columns)
    negative, positive = signed < 0, signed > 0
    # Unused places hold index 0; the spare last place takes what belongs nowhere.
    place = torch.full_like(columns, kept)
    place = torch.where(negative, negative.cumsum(dim=1) - 1, place)
    place = torch.where(positive, kept - positive.cumsum(dim=1), place)
    rank = torch.arange(kept, device=columns.device).expand_as(columns)
    order = columns.new_zeros(len(columns), kept + 1).scatter_(1, place, rank)[:, :kept]
    return columns.gather(1, order)


class _Pointers:
    """A pointer at either end of each row of an order."""

    def __init__(self, order: torch.Tensor) -> None:
        self._order = order
        self._at = torch.zeros(len(order), 2, dtype=torch.int64, device=order.device)
        self._at[:, 1] = order.shape[1] - 1

    def take(self, last: torch.Tensor) -> torch.Tensor:
        """What the pointer at the last or first end is at, [out, 1]; it moves inwards."""
        end = last.long()
        at = self._at.gather(1, end)
        if ((at < 0) | (at >= self._order.shape[1])).any():
            raise UsageError(
                "the authors' DSnoT code runs out of weights to exchange here, and fails",
                "set dsnot.cycles lower, or drop --compat reference",
            )
        self._at.scatter_(1, end, at + 1 - 2 * end)
        return self._order.gather(1, at)
