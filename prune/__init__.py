"""The prune stage: which weights go, and what the others become."""

from secateur.prune.allocate import ALLOCATIONS
from secateur.prune.heal import HealResult, heal_model
from secateur.prune.interleave import share_of_round
from secateur.prune.layer import LayerResult, prune_layer
from secateur.prune.method import Method, Problem, Refinement, Solution
from secateur.prune.methods import METHODS, REFINEMENTS, find_method
from secateur.prune.narrowing import STRUCTURED
from secateur.prune.plan import LayerPlan, Plan
from secateur.prune.stage import PruneResult, plan, prune_model

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "REFINEMENTS",
    "STRUCTURED",
    "HealResult",
    "LayerPlan",
    "LayerResult",
    "Method",
    "Plan",
    "Problem",
    "PruneResult",
    "Refinement",
    "Solution",
    "find_method",
    "heal_model",
    "plan",
    "prune_layer",
    "prune_model",
    "share_of_round",
]
