"""Wanda++: Wanda's score plus the size of regional gradients.

Yang et al. 2025, "Wanda++: Pruning Large Language Models via Regional Gradients", eq. 3 and 4.

    score_ij = (α G_ij + ‖X_j‖) |W_ij|                       W: [out, in]
    G_ij = sqrt(mean over sequences x of (∂ ‖block(x)‖₂ / ∂ W_ij)²)

The gradients are those of one decoder block alone, on the inputs that the pruned blocks before it
put out, so they cost one forward and one backward pass of the block and no loss. Grouping as in
Wanda. The paper's second part, the regional optimiser, is `+blockwise`: ``wandapp+blockwise``.

The authors published no code; α = 100 is the paper's.
"""

from __future__ import annotations

from pydantic import Field

from secateur.prune.masks import keep_highest
from secateur.prune.method import Method, Problem, Solution, masked
from secateur.recipe import Section


class Settings(Section):
    """Settings of `wandapp`."""

    alpha: float = Field(100.0, ge=0, description="Weight of the gradient term.")


def wandapp(problem: Problem, settings: Settings) -> Solution:
    """Keep the weights with the largest activations and regional gradients."""
    gradients = problem.gradients
    if gradients is None or gradients.norm != "l2":
        raise RuntimeError("wandapp needs l2 norms of regional gradients")
    mean = gradients.norms / gradients.scale / gradients.samples**0.5
    score = (settings.alpha * mean + problem.statistics.square_norm.sqrt()) * problem.weight.abs()
    return masked(problem.weight, keep_highest(score, problem.pattern, among="row"))


METHOD = Method(
    name="wandapp",
    summary="Wanda++: Wanda plus gradients of the block's own output; no weight changes",
    source="Yang et al. 2025, eq. 3 and 4",
    needs=frozenset({"norms", "regional"}),
    function=wandapp,
    settings=Settings(),
    workspace=(0, 32),
)
