"""The prune stage: which weights go, and what the others become."""

from secateur.prune.method import Method, Problem, Solution
from secateur.prune.methods import METHODS, find_method
from secateur.prune.plan import LayerPlan, Plan
from secateur.prune.stage import PruneResult, plan, prune_model

__all__ = [
    "METHODS",
    "LayerPlan",
    "Method",
    "Plan",
    "Problem",
    "PruneResult",
    "Solution",
    "find_method",
    "plan",
    "prune_model",
]
