"""Swaps: exchange a kept for a removed weight wherever that lowers the exact output error.

Zimmer et al. 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale" (no code was
published; this is written from the objective).

    x: the layer's weights now, δ = W - x, c = δ G                    W, x, δ, c: [out, in]
    remove p and bring u back:  x_p → 0,  x_u: 0 → W_u
    Δ(p, u) = a_p + b_u - 2 x_p W_u G_pu                  the change of the row's error δ G δᵀ
        a_p = 2 x_p c_p + x_p² G_pp,   b_u = -2 W_u c_u + W_u² G_uu

A swap is made only if Δ < 0, so the error falls with every swap and the number of weights in a row
(a group, a block) stays as it is. Weights that an earlier step changed keep their values; one that
comes back has its dense value.

- N:M: groups from left to right, in each the best swap, all rows at once; sweeps until no group has
  one. A sweep costs as much as one product of W and G. The first sweeps take only swaps that lower
  a row's error by a tenth, by a thirtieth …: the best go first.
- ``P%``: in each row the ``candidates`` kept weights of lowest a_p and as many removed ones of
  lowest b_u; among these the best exact swap until there is none; then new candidates, until they
  have none. With at least as many candidates as columns no improving swap is left at all.
- ``@Rx1``: all terms are sums over the R rows of a block, which move together.

Rows that have converged are not visited again. A row whose error grew (by rounding) is put back.
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.prune.gram import row_errors
from secateur.prune.masks import row_chunks
from secateur.prune.method import GRAM, Problem, Refinement, Solution
from secateur.recipe import Section

# Columns whose c is brought up to date together in a sweep over groups.
_WINDOW = 128
# A swap must lower the row's error by this fraction of it, or rounding might swap for ever.
_LEAST_GAIN = 1e-6
_FIRST_GAINS = (0.1, 0.03, 0.01)


class Settings(Section):
    """Settings of `swaps`."""

    rounds: int = Field(50, ge=1, description="Sweeps, or choices of candidates, at most.")
    candidates: int = Field(24, ge=1, description="Kept and removed weights compared (P% only).")


def swaps(problem: Problem, solution: Solution, settings: Settings) -> Solution:
    """Improve the mask by single exchanges until none helps."""
    gram, pattern = problem.gram, problem.pattern
    columns = problem.weight.shape[1]
    mask, weight = solution.mask.clone(), solution.weight.clone()
    made = rounds = unfinished = 0
    wide = max(columns, 0 if pattern.is_nm else 8 * settings.candidates**2)
    for chunk in row_chunks(len(weight), 6 * 4 * wide, pattern):
        shape = (-1, pattern.rows, columns)
        target, before = problem.weight[chunk].view(shape), weight[chunk].view(shape)
        kept, now = mask[chunk].view(shape)[:, 0].clone(), before.clone()
        active = torch.arange(len(now), device=now.device)
        for number in range(1, settings.rounds + 1):
            choosy = pattern.is_nm and number <= min(len(_FIRST_GAINS), settings.rounds - 1)
            gain = _FIRST_GAINS[number - 1] if choosy else _LEAST_GAIN
            part = _Part(target[active], now[active], kept[active], gram, gain)
            changed = part.sweep(pattern.m) if pattern.is_nm else part.exchange(settings.candidates)
            now[active], kept[active] = part.now, part.kept
            made, rounds = made + int(changed.sum()), max(rounds, number)
            active = active if choosy else active[changed > 0]
            if not len(active):
                break
        unfinished += len(active)
        worse = _errors(target - now, gram) > _errors(target - before, gram)
        now = before.where(worse[:, None, None], now)
        kept = mask[chunk].view(shape)[:, 0].where(worse[:, None], kept)
        weight[chunk] = now.view(-1, columns)
        mask[chunk] = kept.repeat_interleave(pattern.rows, dim=0)
    facts = {"swaps": made, "rounds": rounds, "rows_unfinished": unfinished * pattern.rows}
    return Solution(mask, weight, facts)


def _errors(change: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The error of each block row: [B, R, in] to [B]."""
    return row_errors(change.flatten(0, 1), gram).view(change.shape[:2]).sum(dim=1)


class _Part:
    """Some block rows: ``target`` and ``now`` [B, R, in], ``kept`` [B, in]."""

    def __init__(
        self,
        target: torch.Tensor,
        now: torch.Tensor,
        kept: torch.Tensor,
        gram: torch.Tensor,
        gain: float,
    ) -> None:
        self.target, self.now, self.kept, self.gram = target, now, kept, gram
        self.slope = (target - now) @ gram  # c
        errors = (self.slope * (target - now)).sum(dim=(1, 2))
        self.least = errors.abs() * gain

    def sweep(self, m: int) -> torch.Tensor:
        """One pass over all groups of ``m`` columns; how many swaps each block row made."""
        columns = self.now.shape[2]
        made = torch.zeros(len(self.now), dtype=torch.int64, device=self.now.device)
        step = max(1, _WINDOW // m) * m
        for start in range(0, columns, step):
            window = slice(start, min(start + step, columns))
            before = self.now[:, :, window].clone()
            local = self.gram[window, window]
            slope = self.slope[:, :, window].clone()
            for first in range(0, before.shape[2], m):
                group = slice(start + first, start + first + m)
                here = slice(first, first + m)
                old = self.now[:, :, group].clone()
                new, kept, count = _best_swaps(
                    self.target[:, :, group],
                    old,
                    slope[:, :, here].clone(),
                    self.kept[:, group],
                    local[here, here].expand(len(old), m, m),
                    self.least,
                    most=1,
                )
                self.now[:, :, group], self.kept[:, group] = new, kept
                slope += (old - new) @ local[here]
                made += count
            self.slope += (before - self.now[:, :, window]) @ self.gram[window]
        return made

    def exchange(self, candidates: int) -> torch.Tensor:
        """Swaps among the most promising columns; how many each block row made."""
        square = self.gram.diagonal()
        removal = (2 * self.now * self.slope + self.now.square() * square).sum(dim=1)
        revival = (self.target.square() * square - 2 * self.target * self.slope).sum(dim=1)
        most = int(self.kept.sum(dim=1).max()), int((~self.kept).sum(dim=1).max())
        ends = min(candidates, most[0]), min(candidates, most[1])
        if 0 in ends:
            return torch.zeros(len(self.now), dtype=torch.int64, device=self.now.device)
        removal = removal.masked_fill(~self.kept, torch.inf)
        revival = revival.masked_fill(self.kept, torch.inf)
        chosen = [
            cost.topk(count, dim=1, largest=False).indices
            for cost, count in zip((removal, revival), ends, strict=True)
        ]
        at = torch.cat(chosen, dim=1)
        wide = at[:, None].expand(-1, self.now.shape[1], -1)
        old = self.now.gather(2, wide)
        new, kept, count = _best_swaps(
            self.target.gather(2, wide),
            old,
            self.slope.gather(2, wide),
            self.kept.gather(1, at),
            self.gram[at[:, :, None], at[:, None]],
            self.least,
            most=self.now.shape[2],
            split=ends[0],
        )
        # Sums, as a row with few kept (or removed) weights has some columns among both candidates;
        # only one of the two can have moved.
        self.now.scatter_add_(2, wide, new - old)
        moved = (kept != self.kept.gather(1, at)).long()
        self.kept ^= torch.zeros_like(self.kept, dtype=torch.int64).scatter_add_(1, at, moved) > 0
        return count


def _best_swaps(
    target: torch.Tensor,
    now: torch.Tensor,
    slope: torch.Tensor,
    kept: torch.Tensor,
    gram: torch.Tensor,
    least: torch.Tensor,
    most: int,
    split: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In each block row the best swap among K columns, again and again while one helps.

    Args:
        target, now, slope: W, x and c of these columns, [B, R, K].
        kept: [B, K].
        gram: [B, K, K].
        least: what a swap must gain, [B].
        most: swaps in each block row at most.
        split: columns before it may only go, those from it on only come back; None: all both.

    Returns:
        The new weights and mask, and the number of swaps in each block row.
    """
    rows = len(now)
    square = gram.diagonal(dim1=1, dim2=2)[:, None]
    every = torch.arange(rows, device=now.device)
    made = torch.zeros(rows, dtype=torch.int64, device=now.device)
    now, kept = now.clone(), kept.clone()
    outs, backs = (
        (slice(None), slice(None)) if split is None else (slice(split), slice(split, None))
    )
    cross = gram[:, outs, backs]
    for _ in range(most):
        removal = (2 * now * slope + now.square() * square)[:, :, outs].sum(dim=1)
        revival = (target.square() * square - 2 * target * slope)[:, :, backs].sum(dim=1)
        removal = removal.masked_fill(~kept[:, outs], torch.inf)
        revival = revival.masked_fill(kept[:, backs], torch.inf)
        change = (now[:, :, outs].mT @ target[:, :, backs]).mul_(-2).mul_(cross)
        change += removal[:, :, None]
        change += revival[:, None]
        gain, pair = change.flatten(1).min(dim=1)
        swap = gain < -least
        if not swap.any():
            break
        out, back = pair // change.shape[2], pair % change.shape[2] + (split or 0)
        gone = (now[every, :, out] * swap[:, None])[:, :, None]
        come = (target[every, :, back] * swap[:, None])[:, :, None]
        slope = slope + gone * gram[every, out][:, None] - come * gram[every, back][:, None]
        now[every[swap], :, out[swap]] = 0
        now[every[swap], :, back[swap]] = come[swap, :, 0]
        kept[every[swap], out[swap]] = False
        kept[every[swap], back[swap]] = True
        made += swap
    return now, kept, made


REFINEMENT = Refinement(
    name="swaps",
    summary="exchanges kept for removed weights while the exact error falls",
    source="Zimmer et al. 2025",
    needs=GRAM,
    function=swaps,
    settings=Settings(),
)
