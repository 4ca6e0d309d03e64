"""Swaps: exchange a kept for a removed weight wherever that lowers the exact output error.

Zimmer et al. 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale" (no code was
published; this is written from the objective).

    x: the layer's weights now, δ = W - x, c = δ G                    W, x, δ, c: [out, in]
    remove p and bring u back:  x_p → 0,  x_u: 0 → W_u
    Δ(p, u) = a_p + b_u - 2 x_p W_u G_pu                  the change of the row's error δ G δᵀ
        a_p = 2 x_p c_p + x_p² G_pp,   b_u = -2 W_u c_u + W_u² G_uu

In each row the best swap is made, then c is brought up to date, again and again while a swap lowers
the row's error by more than a millionth of what it was at first. So the error falls with every swap
and the number of weights in a row (a group, a block) stays as it is. Weights that an earlier step
changed keep their values; one that comes back has its dense value.

- N:M: the best of all swaps within a group.
- ``P%``: the best swap of the ``candidates`` kept weights of lowest a_p for any removed one; if
  none of these helps, of the next ``candidates`` kept weights, and so on through all. So at the end
  no swap is left that helps, and with at least as many candidates as columns each is the best.
- ``@Rx1``: all terms are sums over the R rows of a block, which move together.

On a CPU a native loop does this (csrc/swaps.cpp); elsewhere, and where the package was installed
without a compiler, torch does one swap in all rows at once, by the same rule. A row whose error
grew (by rounding) is put back.
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.gram import row_errors
from secateur.prune.masks import row_chunks
from secateur.prune.method import GRAM, Problem, Refinement, Solution
from secateur.recipe import Section

try:
    from secateur.prune import _native
except ImportError:  # installed without a C++ compiler
    _native = None  # type: ignore[assignment]

# A swap must lower the row's error by this fraction of it, or rounding might swap for ever.
_LEAST_GAIN = 1e-6


class Settings(Section):
    """Settings of `swaps`."""

    rounds: int = Field(10_000, ge=1, description="Swaps in each row at most, one a round.")
    candidates: int = Field(24, ge=1, description="Kept weights compared at once (P% only).")


def swaps(problem: Problem, solution: Solution, settings: Settings) -> Solution:
    """Improve the mask by single exchanges until none helps.

    Args:
        problem: its weight is what the layer should do, [out, in].
        solution: its kept weights may differ from the dense ones.
        settings: where to stop, and how many to compare.

    Returns:
        A mask with as many weights in each row (group, block), and weights: those of ``solution``
        where they stayed, dense ones where they came back. Facts: ``swaps`` of all block rows,
        ``rounds``, the most that one made, and ``rows_unfinished``, the rows that made as many as
        they may.
    """
    pattern, (rows, columns) = problem.pattern, problem.weight.shape
    gram, m = problem.gram, pattern.m
    order: slice | torch.Tensor = slice(None)
    compared = settings.candidates * columns
    if pattern.is_nm:  # by place in the group: all firsts, all seconds …
        order = torch.arange(columns, device=gram.device).view(-1, m).T.flatten()
        compared = columns * (m - 1) // 2
    gram = gram[order][:, order].contiguous()
    native = _native is not None and gram.device.type == "cpu"
    mask = solution.mask.new_empty(rows, columns)
    weight = solution.weight.new_empty(rows, columns)
    counts = []
    row_bytes = 4 * (8 * columns + (0 if native else 3 * compared))
    for chunk in row_chunks(rows, row_bytes, pattern):
        shape = (-1, pattern.rows, columns)
        target, before, kept_before = (
            whole[chunk].reshape(shape)[:, :, order].contiguous()
            for whole in (problem.weight, solution.weight, solution.mask)
        )
        kept_before = kept_before[:, 0]
        slope = (target - before) @ gram  # c
        errors = (slope * (target - before)).sum(dim=(1, 2), dtype=torch.float64)
        value, kept = before.where(kept_before[:, None], target), kept_before.clone()
        made = torch.zeros(len(target), dtype=torch.int64, device=gram.device)
        least = (errors.abs() * _LEAST_GAIN).float()
        layer = (gram, target, value, kept, slope, least, made)
        if native:
            limits = (m, settings.candidates, settings.rounds, torch.get_num_threads())
            _native.swap(*layer, *limits)
        else:
            _swap(*layer, m, settings.candidates, settings.rounds)
        now = value.where(kept[:, None], 0)
        after = row_errors((target - now).flatten(0, 1), gram).view(-1, pattern.rows).sum(dim=1)
        worse = after > errors
        now = before.where(worse[:, None, None], now)
        kept = kept_before.where(worse[:, None], kept)
        weight[chunk].view(shape)[:, :, order] = now
        mask[chunk].view(shape)[:, :, order] = kept[:, None].expand(now.shape)
        counts.append(made.where(~worse, 0))
    made = torch.cat(counts)
    facts = {
        "swaps": int(made.sum()),
        "rounds": int(made.max()),
        "rows_unfinished": int((made == settings.rounds).sum()) * pattern.rows,
    }
    return Solution(mask, weight, facts)


def _swap(
    gram: torch.Tensor,
    target: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    slope: torch.Tensor,
    least: torch.Tensor,
    made: torch.Tensor,
    m: int,
    candidates: int,
    limit: int,
) -> None:
    """What ``_native.swap`` does, one swap in all block rows at once.

    With s = 1 for a kept and -1 for a removed column, a_p and b_u are one formula, a column's cost
    2 s v c + v² G_jj, and that it goes or comes back adds s v G to c.

    Args:
        gram: G [in, in]; N:M: its columns (and those of the others) by place in the group.
        target: W [B, R, in].
        value: v, the weight that counts for a column: x if it is kept, W if not, [B, R, in].
        kept: [B, in].
        slope: c [B, R, in].
        least: what a swap must gain, [B].
        made: out: the number of swaps, [B]. ``value``, ``kept`` and ``slope`` change with them.
        m: of the pattern N:M; 0 if it is ``P%``.
        candidates: kept columns compared with all others at once (``P%``).
        limit: swaps in a block row at most.
    """
    square = gram.diagonal()
    passed = torch.zeros_like(made)  # kept columns of lowest cost of which no swap helps (P%)
    active = torch.arange(len(made), device=made.device)
    while len(active):
        v, stays = value[active], kept[active]
        cost = _signs(stays)[:, None] * 2 * v * slope[active] + v.square() * square
        cost = cost.sum(dim=1)
        if m:
            change, pair = _best_in_groups(cost, v, stays, gram, m)
        else:
            change, pair = _best_anywhere(cost, v, stays, gram, passed[active], candidates)
        helps = change < -least[active]
        rows, pair = active[helps], pair[helps]
        for at in pair.T:
            moved = _signs(kept[rows, at])[:, None] * value[rows, :, at]
            slope[rows] += moved[:, :, None] * gram[at][:, None]
            value[rows, :, at] = target[rows, :, at]
            kept[rows, at] ^= True
        made[rows] += 1
        passed[active] = torch.where(helps, 0, passed[active] + candidates)
        more = helps if m else helps | (passed[active] < stays.sum(dim=1))
        active = active[more & (made[active] < limit)]


def _signs(kept: torch.Tensor) -> torch.Tensor:
    return kept * 2.0 - 1


def _best_in_groups(
    cost: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best swap within a group of ``m``: its Δ [B], its two columns [B, 2]."""
    groups = cost.shape[1] // m
    columns = torch.arange(m * groups, device=cost.device).view(m, groups)
    p, u = columns[torch.triu_indices(m, m, 1, device=cost.device)].flatten(1)
    change = cost[:, p] + cost[:, u] - 2 * gram[p, u] * (v[:, :, p] * v[:, :, u]).sum(dim=1)
    best, at = change.masked_fill_(kept[:, p] == kept[:, u], torch.inf).min(dim=1)
    return best, torch.stack((p[at], u[at]), dim=1)


def _best_anywhere(
    cost: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    gram: torch.Tensor,
    passed: torch.Tensor,
    candidates: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best swap of the next ``candidates`` kept columns: its Δ [B], its two columns [B, 2]."""
    columns = cost.shape[1]
    order = cost.masked_fill(~kept, torch.inf).argsort(dim=1, stable=True)
    ranks = passed[:, None] + torch.arange(min(candidates, columns), device=cost.device)
    p = order.gather(1, ranks.clamp(max=columns - 1))
    leaving = cost.gather(1, p).masked_fill(ranks >= kept.sum(dim=1, keepdim=True), torch.inf)
    v_p = v.gather(2, p[:, None].expand(-1, v.shape[1], -1))
    change = (v_p.mT @ v).mul_(-2).mul_(gram[p]).add_(leaving[:, :, None])
    change += cost.masked_fill(kept, torch.inf)[:, None]
    best, at = change.flatten(1).min(dim=1)
    p = p.gather(1, at[:, None] // columns)
    return best, torch.cat((p, at[:, None] % columns), dim=1)


REFINEMENT = Refinement(
    name="swaps",
    summary="exchanges kept for removed weights while the exact error falls",
    source="Zimmer et al. 2025",
    needs=GRAM,
    function=swaps,
    settings=Settings(),
)
