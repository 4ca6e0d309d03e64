"""Least squares on a fixed mask: the best weights in the positions that are kept.

The second step of Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning
for Large Language Models", algorithm 2, for the mask of any method.

    minimise tr (Ŵ - W) H (Ŵ - W)ᵀ  over Ŵ with Ŵ = Ŵ ⊙ M       W, M: [out, in]
    H = G + λI,  λ = damping mean(diag G)

by conjugate gradients with the diagonal of H as preconditioner, on all rows together: each row is a
problem of its own with its own step lengths, but the products with H are one matrix product. λ
pulls the weights to those of the dense model, which is what few calibration tokens call for.

A row is left as it was if its error did not shrink (fact `rows_left`).
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.gram import damped, row_errors
from secateur.prune.masks import row_chunks
from secateur.prune.method import GRAM, Problem, Refinement, Solution
from secateur.recipe import Section


class Settings(Section):
    """Settings of `lsq`."""

    iterations: int = Field(30, ge=1, description="Steps of conjugate gradients at most.")
    damping: float = Field(0.01, ge=0, description="λ relative to the mean of G's diagonal.")
    tolerance: float = Field(1e-4, ge=0, description="Stop when residuals fell by this factor.")


def lsq(problem: Problem, solution: Solution, settings: Settings) -> Solution:
    """Refit the kept weights of every row."""
    gram = damped(problem.gram, settings.damping)
    weight = solution.weight.clone()
    rows, columns = weight.shape
    left = steps = 0
    for chunk in row_chunks(rows, 8 * 4 * columns, problem.pattern):
        target, mask, before = problem.weight[chunk], solution.mask[chunk], weight[chunk]
        after, taken = fit_on_mask(
            target, mask, before, gram, settings.iterations, settings.tolerance
        )
        worse = row_errors(after - target, gram) > row_errors(before - target, gram)
        weight[chunk] = before.where(worse[:, None], after)
        left, steps = left + int(worse.sum()), max(steps, taken)
    return Solution(solution.mask, weight, {"iterations": steps, "rows_left": left})


def fit_on_mask(
    target: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    gram: torch.Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[torch.Tensor, int]:
    """Minimise tr (Ŵ - W) H (Ŵ - W)ᵀ on the mask.

    Args:
        target: W, [rows, in].
        mask: [rows, in], True = kept.
        start: where to begin; zero outside the mask.
        gram: H, [in, in], with a positive diagonal.
        iterations, tolerance: as in `Settings`.

    Returns:
        Ŵ [rows, in], and the number of steps taken.
    """
    inverse = gram.diagonal().reciprocal()
    fitted = start.clone()
    residual = ((target - fitted) @ gram) * mask
    direction = residual * inverse
    power = (residual * direction).sum(dim=1, keepdim=True)
    enough = power * tolerance**2
    for step in range(iterations):
        if bool((power <= enough).all()):
            return fitted, step
        image = (direction @ gram) * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = (power / curvature).where((power > enough) & (curvature > 0), 0)
        fitted += length * direction
        residual -= length * image
        scaled = residual * inverse
        last, power = power, (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled + direction * (power / last).where(last > 0, 0)
    return fitted, iterations


REFINEMENT = Refinement(
    name="lsq",
    summary="least squares on the mask: the best weights in the positions that are kept",
    source="Meng et al. 2024, algorithm 2",
    needs=GRAM,
    function=lsq,
    settings=Settings(),
)
