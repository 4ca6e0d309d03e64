"""What a pruning method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from secateur.pattern import Pattern
    from secateur.statistics import InputStatistics


@dataclass(frozen=True, slots=True)
class Problem:
    """One linear layer to prune.

    Attributes:
        weight: ``[out, in]`` fp32.
        inputs: statistics of its calibration inputs; None if the method needs none and none
            were collected.
        pattern: a pattern that fits the weight.
        compat: "reference" repeats the counting of the method's published code.
    """

    weight: torch.Tensor
    inputs: InputStatistics | None
    pattern: Pattern
    compat: Literal["exact", "reference"] = "exact"


@dataclass(frozen=True, slots=True)
class Solution:
    """A pruned layer.

    Attributes:
        mask: ``[out, in]`` bool, True = kept.
        weight: ``[out, in]`` fp32; zero where the mask is False.
        facts: counts of anything unusual, for the manifest.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Method:
    """A named way to prune a layer.

    Attributes:
        summary: one line for `secateur methods`.
        source: paper, and equation if it is one.
        needs_text: whether it reads statistics of the inputs.
        solve: the method itself, a pure function.
    """

    name: str
    summary: str
    source: str
    needs_text: bool
    solve: Callable[[Problem], Solution]


def masked(weight: torch.Tensor, mask: torch.Tensor) -> Solution:
    """The solution that keeps the weights of ``mask`` as they are."""
    return Solution(mask, weight.where(mask, weight.new_zeros(())))
