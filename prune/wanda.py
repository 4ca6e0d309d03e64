"""Wanda: remove the weights that contribute least to their output.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1.

    score_ij = |W_ij| ‖X_j‖                       W: [out, in], X_j: all inputs of column j

``P%`` compares the weights of each output row, N:M those of each group. The norm is over tokens,
its square averaged over sequences, in fp32, as in the authors' code.
"""

from __future__ import annotations

from secateur.prune.masks import keep_highest
from secateur.prune.method import Method, Problem, Solution, masked


def wanda(problem: Problem) -> Solution:
    """Keep the weights with the largest products of magnitude and input norm."""
    assert problem.inputs is not None
    score = problem.weight.abs() * problem.inputs.square_norm.sqrt()
    return masked(problem.weight, keep_highest(score, problem.pattern, among="row"))


METHOD = Method(
    name="wanda",
    summary="weight times norm of its input; no weight changes",
    source="Sun et al. 2023, eq. 1",
    needs_text=True,
    solve=wanda,
)
