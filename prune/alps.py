"""ALPS: mask and weights together by ADMM with a growing penalty, then least squares on the mask.

Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", algorithms 1 and 2.

    H = G + λI,  n = sqrt(diag H),  H ← H / (n nᵀ),  B = W n         W: [out, in]
    D = the k largest of B, V = 0; repeat
        X = (B H - V + ρ D) (H + ρI)⁻¹
        D = the k largest of X + V / ρ
        V = V + ρ (X - D)
    Ŵ = least squares on the support of D, from D                    (see `lsq`)

Every third step ρ grows by how far the support of D moved since: by 1.3, 1.2 or 1.1 for more than
10 %, 0.5 % or none of k; it ends when the support stays. If it hardly moves at first, ρ was too
large: it starts again from a fifth. The inverse for each ρ comes from one eigendecomposition in
fp64.

``P%`` compares the weights of the whole layer, or of each row with ``alps.among=row``. In ``@Rx1``
patterns the largest blocks are those with the largest sum of squares.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.gram import damped
from secateur.prune.lsq import fit_on_mask
from secateur.prune.masks import keep_highest
from secateur.prune.method import GRAM, Method, Problem, Solution
from secateur.recipe import Section

_MOST_RESTARTS = 5


class Settings(Section):
    """Settings of `alps`."""

    iterations: int = Field(300, ge=1, description="Steps of ADMM at most.")
    rho: float = Field(0.1, gt=0, description="First penalty ρ.")
    percdamp: float = Field(0.01, ge=0, description="λ relative to the mean of G's diagonal.")
    refit: int = Field(10, ge=1, description="Steps of conjugate gradients on the mask.")
    among: Literal["layer", "row"] = Field("layer", description="What P% compares.")


def alps(problem: Problem, settings: Settings) -> Solution:
    """Let the support settle under a growing penalty, then refit."""
    gram = damped(problem.gram, settings.percdamp)
    norm = gram.diagonal().sqrt()
    scaled = gram / norm / norm[:, None]

    def decompose() -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(scaled.double())
        return values.clamp_min(0).float(), vectors.float()

    values, vectors = problem.statistics.derived(("alps", settings.percdamp), decompose)
    dense = problem.weight * norm
    target = dense @ scaled

    def project(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = keep_highest(weight.square(), problem.pattern, settings.among)
        return weight * mask, mask

    rho, restarts, started = settings.rho, 0, False
    sparse, mask = project(dense)
    dual = torch.zeros_like(dense)
    known, step, since = mask, 0, 0
    for step in range(1, settings.iterations + 1):  # noqa: B007
        free = (target - dual + rho * sparse) @ vectors / (values + rho) @ vectors.T
        sparse, mask = project(free + dual / rho)
        dual += rho * (free - sparse)
        since += 1
        if since % 3:
            continue
        moved = int((mask ^ known).sum()) / max(1, int(mask.sum()))
        known = mask
        started |= moved > 0.005
        if not started and restarts < _MOST_RESTARTS:
            rho, restarts, since = rho / 5, restarts + 1, 0
            sparse, mask = project(dense)
            dual, known = torch.zeros_like(dense), mask
        elif moved == 0 or (since >= 30 and moved < 3e-4):
            break
        else:
            rho *= 1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1
    weight, _ = fit_on_mask(problem.weight, mask, sparse / norm, gram, settings.refit, 1e-4)
    return Solution(mask, weight, {"iterations": step, "restarts": restarts})


METHOD = Method(
    name="alps",
    summary="mask and weights together under a growing penalty; best beyond 60 %",
    source="Meng et al. 2024, algorithms 1 and 2",
    needs=GRAM,
    function=alps,
    settings=Settings(),
    workspace=(56, 48),
)
