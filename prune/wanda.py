"""Wanda: remove the weights that contribute least to their output.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1.

    score_ij = |W_ij| ‖X_j‖                       W: [out, in], X_j: all inputs of column j

``P%`` compares the weights of each output row, N:M those of each group. The norm is over tokens,
its square averaged over sequences, in fp32, as in the authors' code.

``wanda.variant=true`` (section 4.4's variant, ``P%`` only) lets rows differ in sparsity: with the
scores of a row in ascending order, weight k goes if the first k make up at most a fraction α of
the row's sum; α is the same for all rows.

Difference from the authors' code (`compat: reference` repeats it): they search α by bisection
until the sparsity is within 0.001; here the weights with the smallest fractions go, which is the α
of that sparsity, to the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from secateur.prune.masks import keep_highest, per_block
from secateur.prune.method import NORMS, Method, Problem, Solution, masked
from secateur.recipe import Section

if TYPE_CHECKING:
    import torch


class Settings(Section):
    """Settings of `wanda`."""

    variant: bool = Field(False, description="Let rows differ in sparsity (P% only).")


def wanda(problem: Problem, settings: Settings) -> Solution:
    """Keep the weights with the largest products of magnitude and input norm."""
    score = problem.weight.abs() * problem.statistics.square_norm.sqrt()
    pattern = problem.pattern
    if not settings.variant or pattern.is_nm:
        return masked(problem.weight, keep_highest(score, pattern, among="row"))
    blocks = per_block(score, pattern)
    if problem.compat == "reference":
        kept = _bisected(blocks, float(pattern.removed))
        return masked(problem.weight, kept.repeat_interleave(pattern.rows, dim=0))
    ascending, order = blocks.sort(dim=1, stable=True)
    fractions = ascending.double().cumsum(dim=1)
    fractions /= fractions[:, -1:].clamp_min(1e-300)
    fractions = fractions.new_empty(blocks.shape).scatter_(1, order, fractions)
    score = fractions.repeat_interleave(pattern.rows, dim=0)
    return masked(problem.weight, keep_highest(score, pattern, among="layer"))


def _bisected(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The mask of the authors' bisection for α in [0, 0.8]."""
    ascending, _ = score.sort(dim=1, stable=True)
    running, total = ascending.cumsum(dim=1), score.sum(dim=1, keepdim=True)
    low, alpha, high = 0.0, 0.4, 0.8
    while True:
        count = (running <= total * alpha).sum(dim=1, keepdim=True)
        threshold = ascending.gather(1, (count - 1).clamp_min(0))
        kept = (score > threshold) | (count == 0)
        removed = 1 - float(kept.double().mean())
        if abs(removed - sparsity) <= 0.001 or high - low < 0.001:
            return kept
        low, high = (low, alpha) if removed > sparsity else (alpha, high)
        alpha = (low + high) / 2


METHOD = Method(
    name="wanda",
    summary="weight times norm of its input; no weight changes",
    source="Sun et al. 2023, eq. 1",
    needs=NORMS,
    function=wanda,
    settings=Settings(),
)
