"""What a pruning method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from secateur.statistics import Need

if TYPE_CHECKING:
    import torch

    from secateur.activations import Activations
    from secateur.pattern import Pattern
    from secateur.statistics import GradientNorms, InputStatistics

NORMS: frozenset[Need] = frozenset({"norms"})
GRAM: frozenset[Need] = frozenset({"norms", "gram"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One linear layer to prune.

    Attributes:
        weight: ``[out, in]`` fp32.
        inputs: statistics of its calibration inputs; None if the method needs none and none
            were collected.
        pattern: a pattern that fits the weight.
        compat: "reference" repeats what the method's published code does, bugs included.
        gradients: statistics of the weight's gradients; None if none were collected.
    """

    weight: torch.Tensor
    inputs: InputStatistics | None
    pattern: Pattern
    compat: Literal["exact", "reference"] = "exact"
    gradients: GradientNorms | None = None

    @property
    def statistics(self) -> InputStatistics:
        """The statistics of the inputs, where a method cannot do without."""
        if self.inputs is None:
            raise RuntimeError("this method needs statistics of the inputs")
        return self.inputs

    @property
    def gram(self) -> torch.Tensor:
        """``[in, in]`` fp32: Σ x xᵀ over the tokens of the calibration."""
        return self.statistics.gram


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
    """A named way to prune a layer: the first word of a chain, or a whole chain.

    Attributes:
        summary: one line for `secateur methods`.
        source: paper, and equation if it is one.
        needs: the statistics that it reads.
        function: the method itself, a pure function of the problem and the settings.
        settings: a frozen pydantic model; its fields can be set as ``name.field=value``.
        workspace: bytes it takes for each in² and for each out x in of a layer, about.
        regional: the last step of a chain that works on whole regions of a block, if it has one.
    """

    name: str
    summary: str
    source: str
    needs: frozenset[Need]
    function: Callable[[Problem, Any], Solution]
    settings: Any
    workspace: tuple[int, int] = (0, 24)
    regional: RegionStep | None = None

    @property
    def needs_text(self) -> bool:
        """Whether it reads statistics of the inputs."""
        return bool(self.needs)

    def solve(self, problem: Problem) -> Solution:
        """Prune one layer."""
        return self.function(problem, self.settings)


@dataclass(frozen=True, slots=True)
class Refinement:
    """A named way to improve a pruned layer: a later word of a chain.

    Attributes:
        summary, source, needs, settings: as in `Method`.
        function: a pure function of the problem, the solution so far and the settings.
    """

    name: str
    summary: str
    source: str
    needs: frozenset[Need]
    function: Callable[[Problem, Solution, Any], Solution]
    settings: Any
    workspace: tuple[int, int] = (4, 48)

    def refine(self, problem: Problem, solution: Solution) -> Solution:
        """Improve one layer; the facts are of this step alone."""
        return self.function(problem, solution, self.settings)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a block, its attention or its MLP, with what the dense one made of its inputs.

    Attributes:
        name: of the module within the block, e.g. ``self_attn``.
        forward: the region with the weights that it has now: ``[1, tokens, hidden]`` to the same.
        inputs, targets: the dense block's, one for each sample.
        weights: parameters that may change, and which of their positions are kept; those that
            are not stay 0.
    """

    name: str
    forward: Callable[[int], torch.Tensor]
    inputs: Activations
    targets: Activations
    weights: list[tuple[torch.nn.Parameter, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class RegionStep:
    """A refinement of whole regions; the last word of a chain.

    Attributes:
        summary, source, settings: as in `Method`.
        function: changes the weights of a region in place; returns counts for the manifest.
    """

    name: str
    summary: str
    source: str
    function: Callable[[Region, Any], dict[str, Any]]
    settings: Any
    needs: frozenset[Need] = NORMS


def masked(weight: torch.Tensor, mask: torch.Tensor) -> Solution:
    """The solution that keeps the weights of ``mask`` as they are."""
    return Solution(mask, weight.where(mask, weight.new_zeros(())))
