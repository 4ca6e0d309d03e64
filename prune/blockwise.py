"""Block-wise reconstruction: the kept weights of a whole region learn what the dense region does.

Attention and MLP are reconstructed separately, each against the dense block's own output, with
gradients through the region but no loss of the model: Wagner et al. 2025, "A Free Lunch in LLM
Compression: Revisiting Retraining after Pruning", section 4; Yang et al. 2025, "Wanda++: Pruning
Large Language Models via Regional Gradients", section 3.3.

    minimise Σ_x ‖R(x; W ⊙ M) - R(x; W_dense)‖² / Σ_x ‖R(x; W_dense)‖²      R: attention or MLP
    over the kept weights, by Adam on one sequence after the other

Every layer-wise method treats a linear alone; here q, k, v and o (or gate, up and down) make up
for each other. A region whose error did not shrink keeps the weights that it had
(`kept_before`: true).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field

from secateur.prune.method import Region, RegionStep
from secateur.recipe import Section


class Settings(Section):
    """Settings of `blockwise`."""

    epochs: int = Field(4, ge=1, description="Times that every sequence is used.")
    rate: float = Field(
        0.01, gt=0, description="Learning rate, relative to the root mean square of the weights."
    )


def blockwise(region: Region, settings: Settings) -> dict[str, Any]:
    """Fit a region's kept weights to its dense outputs, in place."""
    before = _error(region)
    dense = [weight.detach().clone() for weight, _ in region.weights]
    groups = []
    for weight, mask in region.weights:
        weight.requires_grad_(True)
        size = float(weight.detach()[mask].square().mean().sqrt()) if mask.any() else 1.0
        groups.append({"params": [weight], "lr": settings.rate * size})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = settings.epochs * len(region.inputs)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    power = _power(region)
    for _ in range(settings.epochs):
        for number in range(len(region.inputs)):
            with torch.enable_grad():
                difference = region.forward(number) - region.targets[number]
                torch.autograd.backward(difference.square().sum() / power)
            for weight, mask in region.weights:
                if weight.grad is not None:
                    weight.grad.mul_(mask)
            optimiser.step()
            optimiser.zero_grad()
            decay.step()
    for weight, _ in region.weights:
        weight.requires_grad_(False)
    after = _error(region)
    kept = not after < before
    if kept:
        for (weight, _), old in zip(region.weights, dense, strict=True):
            weight.copy_(old)
    return {
        "region": region.name,
        "error_before": before,
        "error_after": before if kept else after,
        "kept_before": kept,
    }


def _power(region: Region) -> float:
    """Mean over sequences of ‖target‖²."""
    squares = (region.targets[number] for number in range(len(region.targets)))
    total = sum(float(target.double().square().sum()) for target in squares)
    return max(total / len(region.targets), 1e-30)


def _error(region: Region) -> float:
    """Σ‖R(x) - target‖² / Σ‖target‖²."""
    lost = 0.0
    with torch.no_grad():
        for number in range(len(region.inputs)):
            difference = region.forward(number) - region.targets[number]
            lost += float(difference.double().square().sum())
    return lost / len(region.inputs) / _power(region)


STEP = RegionStep(
    name="blockwise",
    summary="attention and MLP, each as a whole, learn the dense one's output; last word only",
    source="Wagner et al. 2025, section 4; Yang et al. 2025, section 3.3",
    function=blockwise,
    settings=Settings(),
)
