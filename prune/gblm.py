"""GBLM-Pruner: Wanda's score plus the size of the weight's gradients.

Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
eq. 4.

    score_ij = |W_ij| ‖X_j‖ + α |W_ij| ‖G_ij‖_p      W: [out, in], G_ij: gradients over samples

with α = 100, p = 2 (the paper's results) or 1 (``gblm.norm=l1``), gradients of the mean token loss
of the dense model, one per sample. ``gblm.gradient_only=true`` drops the first term. Grouping as
in Wanda: ``P%`` compares the weights of each output row.

Differences from the authors' code (`compat: reference` repeats it): there the gradients are
scaled by 100 instead of the score by α, and summed (l1) or stored (l2) in fp16, which saturates
and underflows; here in fp32. In both, the balance of the two terms depends on the number of
samples, as ‖X_j‖ is a mean over them and ‖G_ij‖_p a sum; ``gblm.normalise=true`` divides the
latter by samples^(1/p).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.prune.masks import keep_highest
from secateur.prune.method import Method, Problem, Solution, masked
from secateur.recipe import Section


class Settings(Section):
    """Settings of `gblm`."""

    norm: Literal["l1", "l2"] = Field("l2", description="Norm over the samples' gradients.")
    alpha: float = Field(100.0, ge=0, description="Weight of the gradient term.")
    normalise: bool = Field(False, description="Divide the norm by samples^(1/p).")
    gradient_only: bool = Field(False, description="Leave the activations out.")


def gblm(problem: Problem, settings: Settings) -> Solution:
    """Keep the weights with the largest activations and gradients."""
    gradients = problem.gradients
    if gradients is None or gradients.norm != settings.norm:
        raise RuntimeError(f"gblm needs {settings.norm} statistics of the gradients")
    size = problem.weight.abs()
    factor = settings.alpha / gradients.scale
    if settings.normalise:
        factor /= gradients.samples ** (1.0 if settings.norm == "l1" else 0.5)
    score = size * (gradients.norms * factor)
    if not settings.gradient_only:
        score = size * problem.statistics.square_norm.sqrt() + score
    return masked(problem.weight, keep_highest(score, problem.pattern, among="row"))


METHOD = Method(
    name="gblm",
    summary="Wanda plus gradients of the dense model; no weight changes",
    source="Das et al. 2023, eq. 4",
    needs=frozenset({"norms", "gradients"}),
    function=gblm,
    settings=Settings(),
    workspace=(0, 32),
)
