"""RIA: relative importance of a weight in its row and column, and its activations.

Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models", eq. 3 and 4.

    score_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) ‖X_j‖^a      W: [out, in], a = 0.5

Grouping as in Wanda: ``P%`` compares the weights of each output row. The norm is
Wanda's. The authors' channel permutation is not part of it.

Difference from the authors' code: a column or row of zeros gives 0/0 there, a NaN that sorts
as the most important; here it scores 0.
"""

from __future__ import annotations

from pydantic import Field

from secateur.prune.masks import keep_highest
from secateur.prune.method import NORMS, Method, Problem, Solution, masked
from secateur.recipe import Section


class Settings(Section):
    """Settings of `ria`."""

    a: float = Field(0.5, ge=0, description="Power of the input norm.")


def ria(problem: Problem, settings: Settings) -> Solution:
    """Keep the weights that matter most to their row and column, scaled by their input."""
    size = problem.weight.abs()
    in_column, in_row = size.sum(dim=0), size.sum(dim=1, keepdim=True)
    in_column, in_row = in_column.where(in_column > 0, 1), in_row.where(in_row > 0, 1)
    norm = problem.statistics.square_norm.sqrt()
    score = (size / in_column + size / in_row) * norm**settings.a
    return masked(problem.weight, keep_highest(score, problem.pattern, among="row"))


METHOD = Method(
    name="ria",
    summary="share of its row and column, times root of input norm; no weight changes",
    source="Zhang et al. 2024, eq. 3 and 4",
    needs=NORMS,
    function=ria,
    settings=Settings(),
)
