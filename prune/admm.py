"""ADMM pruning: find mask and weights together, tightening the mask gradually.

Boža 2024, "Fast and Effective Weight Update for Pruned Large Language Models", algorithm 1 and
section 3.3.

    W ← W n,  G ← G / (n nᵀ),  n = sqrt(diag G)                      W: [out, in]
    H = G + λI,  λ = percdamp,  Y = W H,  U = 0,  ρ = 1
    for t in 1 … iterations:
        M = the largest |W + U|, at sparsity s(t) = P (1 - (1 - t/T)³) while t <= T
        Z = (W + U) ⊙ M
        U = U + W - Z
        W = (Y + ρ (Z - U)) (H + ρI)⁻¹
    Ŵ = (W + U) ⊙ M / n

``P%`` compares the weights of the whole layer, or of each row with ``admm.among=row``. With N:M
the M - N smallest of each group are to go, and s(t) says how many of these, the smallest of the
layer, have gone by step t.

Differences from the authors' code (`compat: reference` repeats them):
- ``P%`` over the whole layer: they compute s(t), then use P from the first step on.
- N:M: they know 2:4 only, whatever N and M are; `compat: reference` refuses others.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field

from secateur.errors import UsageError
from secateur.gram import damped
from secateur.prune.masks import drop_lowest, keep_highest, per_block
from secateur.prune.method import GRAM, Method, Problem, Solution
from secateur.recipe import Section


class Settings(Section):
    """Settings of `admm`."""

    iterations: int = Field(20, ge=1, description="Steps in all.")
    tighten: int = Field(15, ge=1, description="T: steps until the mask is as sparse as asked.")
    percdamp: float = Field(0.1, ge=0, description="λ, with G's diagonal scaled to 1.")
    among: Literal["layer", "row"] = Field("layer", description="What P% compares.")


def admm(problem: Problem, settings: Settings) -> Solution:
    """Alternate between the best weights and the best mask."""
    if problem.compat == "reference" and problem.pattern.is_nm:
        _require_2of4(problem)
    gram, weight = problem.gram, problem.weight
    norm = gram.diagonal().sqrt() + 1e-8
    gram = damped(gram / norm / norm[:, None], settings.percdamp)
    weight = weight * norm
    target = weight @ gram
    identity = torch.eye(len(gram), device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + identity))
    dual = torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, settings.iterations + 1):
        if step <= settings.tighten:
            mask = _mask(weight + dual, step, problem, settings)
        sparse = (weight + dual) * mask
        dual = dual + (weight - sparse)
        weight = (target + sparse - dual) @ inverse
    return Solution(mask, (weight + dual) * mask / norm)


def _mask(weight: torch.Tensor, step: int, problem: Problem, settings: Settings) -> torch.Tensor:
    """The mask of one step."""
    pattern = problem.pattern
    score = weight.abs() if pattern.rows == 1 else weight.square()
    last = min(settings.tighten, settings.iterations)
    share = 1 - (1 - Fraction(min(step, last), last)) ** 3
    if pattern.is_nm:
        groups = per_block(score, pattern).reshape(-1, pattern.m)
        leaving = groups.masked_fill(drop_lowest(groups, pattern.m - pattern.n), torch.inf)
        count = int(share * leaving.numel() * pattern.removed)
        kept = drop_lowest(leaving.reshape(1, -1), count)
        return kept.reshape(-1, weight.shape[1]).repeat_interleave(pattern.rows, dim=0)
    if problem.compat == "reference" and settings.among == "layer":
        share = Fraction(1)
    return keep_highest(score, replace(pattern, removed=pattern.removed * share), settings.among)


def _require_2of4(problem: Problem) -> None:
    if (problem.pattern.n, problem.pattern.m) != (2, 4):
        raise UsageError(
            f"the authors' ADMM code makes 2:4 masks whatever is asked for, not {problem.pattern}",
            "drop --compat reference",
        )


METHOD = Method(
    name="admm",
    summary="mask and weights together, tightened step by step",
    source="Boža 2024, algorithm 1",
    needs=GRAM,
    function=admm,
    settings=Settings(),
    workspace=(16, 40),
)
