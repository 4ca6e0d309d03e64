"""Allocation: how much of a model's sparsity each decoder block bears, for ``P%`` patterns.

An allocation reduces every block to one number, its *measure*, and turns the measures of all
blocks into their sparsities, so that only one block needs to be in memory at a time.

    uniform        every block P %.

    owl            Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.2.
                   D = share of a block's Wanda scores above M times their mean     M = 5
                   sparsity = c - 2λ (D - min D) / (max D - min D)                  λ = 0.08
                   A block with more outliers keeps more.

    alphapruning   Lu et al. 2024, "AlphaPruning: Using Heavy-Tailed Self Regularization Theory
                   for Improved Layer-wise Pruning of Large Language Models", section 3.
                   D = mean over a block's linears of α = 1 + n / Σ ln(λ_i / λ_min), of the n
                   eigenvalues λ_i ≥ λ_min of W Wᵀ
                   sparsity = c (1 - ε + 2ε (D - min D) / (max D - min D))          ε = 0.3
                   A block with a lighter tail (larger α) keeps less.
                   λ_min is where the histogram of log λ (100 bins) peaks: of the eigenvalues
                   between 0.95 and 1.5 times the peak the one with the best fit
                   (Kolmogorov-Smirnov distance); or with ``fit=median`` the median.

c is such that the mean of the sparsities, weighted by the blocks' weights, is P %; sparsities stay
within 0 and 95 %, and what that cuts off goes to the other blocks. Blocks with the same measure
all get P %.

Differences from the authors' code (`compat: reference` repeats them):

- OWL's mean is over blocks, whatever their size, and its sparsities can leave 0 to 100 %.
  AlphaPruning's can exceed 100 %.
- AlphaPruning compares eigenvalues with the logarithm of 0.95 times the peak, so any below the
  peak can become λ_min; eigenvalues come from singular values in fp32, and one that is zero makes
  α zero or an error. Here eigenvalues that are rounding are left out.
- Their OWL uses M = 3 unless told otherwise.
- Blocks with the same measure divide zero by zero there; not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from secateur.errors import ModelError, UsageError, did_you_mean
from secateur.pattern import Pattern
from secateur.recipe import Section, validate

if TYPE_CHECKING:
    import torch

Compat = Literal["exact", "reference"]
Fit = Literal["peak", "median"]
HIGHEST = 0.95
_BINS = 100


@dataclass(frozen=True, slots=True)
class Allocation:
    """A named way to share a model's sparsity out among its blocks.

    Attributes:
        summary: one line for `secateur methods`.
        source: paper, and section.
        needs: what `measure` is given of every linear of a block: nothing; its Wanda scores
            ``|W| · square_norm.sqrt()`` with statistics of the dense model; or its weight.
        settings: a frozen pydantic model.
    """

    name: str
    summary: str
    source: str
    needs: Literal["nothing", "scores", "weights"]
    measurement: Callable[[Sequence[torch.Tensor], Any, Compat], float]
    distribution: Callable[[Sequence[float], Sequence[int], float, Any, Compat], list[float]]
    settings: Any

    def measure(self, matrices: Sequence[torch.Tensor], compat: Compat = "exact") -> float:
        """The measure of one block.

        Args:
            matrices: ``[out, in]`` each, what `needs` says of the linears that will be pruned;
                at least one unless it says "nothing".

        Raises:
            ModelError: values that are not finite, or that have no spectrum.
        """
        return self.measurement(matrices, self.settings, compat)

    def ratios(
        self,
        measures: Sequence[float],
        weights: Sequence[int],
        target: float,
        compat: Compat = "exact",
    ) -> list[float]:
        """The sparsities of all blocks, as fractions.

        Args:
            measures: one number per block.
            weights: how many weights of each block will be pruned; at least one.
            target: the sparsity of the whole, as a fraction.

        Raises:
            UsageError: the target leaves no room below the highest sparsity of a block.
        """
        return self.distribution(measures, weights, target, self.settings, compat)


class UniformSettings(Section):
    """`uniform` has no settings."""


class OwlSettings(Section):
    """Settings of `owl`."""

    threshold: float = Field(
        5.0, gt=0, description="M: a score above M times the block's mean is an outlier."
    )
    spread: float = Field(
        0.08, ge=0, le=0.5, description="λ: the sparsities of blocks differ by at most 2λ."
    )


class AlphaPruningSettings(Section):
    """Settings of `alphapruning`."""

    spread: float = Field(
        0.3, ge=0, lt=1, description="ε: sparsities relate as 1 - ε to 1 + ε at most."
    )
    fit: Fit = Field("peak", description="Where the tail of the spectrum begins.")


def outlier_share(scores: Sequence[torch.Tensor], threshold: float) -> float:
    """The share of all scores that lie above ``threshold`` times their mean.

    Args:
        scores: of the linears of one block, of any shapes.

    Raises:
        ModelError: scores that are not finite.
    """
    import torch

    count = sum(score.numel() for score in scores)
    mean = math.fsum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    if not math.isfinite(mean):
        raise ModelError(
            "the scores of a block hold NaN or infinite values",
            "the model or its calibration text is damaged: get them again",
        )
    return sum(int((score > threshold * mean).sum()) for score in scores) / count


def tail_exponent(weight: torch.Tensor, fit: Fit = "peak", compat: Compat = "exact") -> float:
    """The exponent α of the tail of the spectrum of W Wᵀ, by Hill's estimator.

    Args:
        weight: ``[out, in]``, finite.
        fit: where the tail begins.

    Returns:
        α > 1; infinite if the eigenvalues do not differ, or are too wide apart to fit.
    """
    import torch

    values = _eigenvalues(weight, compat)
    logs = values.log()
    counts = torch.arange(len(values), 0, -1, dtype=torch.float64)
    # Of the tail that begins at each eigenvalue: Σ ln(λ_i / λ_min).
    spreads = logs.flip(0).cumsum(0).flip(0) - counts * logs
    alphas = torch.where(spreads > 0, 1 + counts / spreads, math.inf)
    if fit == "median":
        return float(alphas[len(values) // 2]) if len(values) else math.inf
    return min(
        (
            (_distance(values[k:], float(alphas[k])), float(alphas[k]))
            for k in _starts(values, compat)
        ),
        default=(1.0, math.inf),
        key=lambda distance_and_alpha: distance_and_alpha[0],
    )[1]


def _eigenvalues(weight: torch.Tensor, compat: Compat) -> torch.Tensor:
    """Of W Wᵀ, ascending, fp64, on the CPU."""
    import torch

    if compat == "reference":
        singular: torch.Tensor = torch.linalg.svdvals(weight.float())
        return singular.square().flip(0).double().cpu()
    # In fp64 the smaller Gram matrix loses nothing that fp32 singular values have, and is faster.
    wide = weight.double()
    wide = wide.t() if wide.shape[0] > wide.shape[1] else wide
    values: torch.Tensor = torch.linalg.eigvalsh(wide @ wide.t()).cpu()
    return values[values > values[-1] * len(values) * torch.finfo(torch.float64).eps]


def _starts(values: torch.Tensor, compat: Compat) -> list[int]:
    """The eigenvalues, by index, at which the tail may begin: those at the histogram's peak."""
    import torch

    if len(values) < 2 or not 0 < values[0] < values[-1]:
        return []
    logs = values.log10()
    if compat == "reference":
        logs = logs.float()
    low, high = float(logs[0]), float(logs[-1])
    fullest = int(torch.histc(logs, _BINS, low, high).argmax())
    peak = 10 ** (low + (high - low) * fullest / _BINS)
    least = math.log10(0.95 * peak) if compat == "reference" else 0.95 * peak
    # Never empty: a bin of what fp64 tells apart is at most 1.43 wide.
    near = (values >= least) & (values <= 1.5 * peak)
    starts: list[int] = near[:-1].nonzero().flatten().tolist()
    return starts


def _distance(tail: torch.Tensor, alpha: float) -> float:
    """The Kolmogorov-Smirnov distance of a tail from the power law with this exponent."""
    import torch

    empirical = torch.arange(len(tail), dtype=torch.float64) / len(tail)
    return float((1 - (tail / tail[0]) ** (1 - alpha) - empirical).abs().max())


def _no_measure(_: Sequence[torch.Tensor], settings: UniformSettings, compat: Compat) -> float:
    return 0.0


def _owl_measure(scores: Sequence[torch.Tensor], settings: OwlSettings, compat: Compat) -> float:
    return outlier_share(scores, settings.threshold)


def _alpha_measure(
    weights: Sequence[torch.Tensor], settings: AlphaPruningSettings, compat: Compat
) -> float:
    if not all(weight.isfinite().all() for weight in weights):
        raise ModelError(
            "the weights of a block hold NaN or infinite values",
            "the model is damaged: get it again",
        )
    alpha = fmean(tail_exponent(weight, settings.fit, compat) for weight in weights)
    if not math.isfinite(alpha):
        raise ModelError(
            "the weights of a block have no spectrum: a matrix is zero or orthogonal",
            "allocate by 'owl' or 'uniform'",
        )
    return alpha


def _same(
    measures: Sequence[float],
    weights: Sequence[int],
    target: float,
    settings: UniformSettings,
    compat: Compat,
) -> list[float]:
    return [target] * len(measures)


def _owl_ratios(
    measures: Sequence[float],
    weights: Sequence[int],
    target: float,
    settings: OwlSettings,
    compat: Compat,
) -> list[float]:
    lower = [2 * settings.spread * level for level in _levels(measures)]
    if compat == "reference":
        mean = fmean(lower)
        return [target + mean - less for less in lower]
    return _filled([-less for less in lower], [1.0] * len(lower), weights, target)


def _alpha_ratios(
    measures: Sequence[float],
    weights: Sequence[int],
    target: float,
    settings: AlphaPruningSettings,
    compat: Compat,
) -> list[float]:
    shares = [1 + settings.spread * (2 * level - 1) for level in _levels(measures)]
    if compat == "reference":
        scale = target * sum(weights) / math.fsum(map(math.prod, zip(weights, shares, strict=True)))
        return [share * scale for share in shares]
    return _filled([0.0] * len(shares), shares, weights, target)


def _levels(measures: Sequence[float]) -> list[float]:
    """Measures, scaled to 0 … 1; all the same if they are."""
    low, high = min(measures), max(measures)
    return [(measure - low) / (high - low) if high > low else 0.5 for measure in measures]


def _filled(
    offsets: Sequence[float], slopes: Sequence[float], weights: Sequence[int], target: float
) -> list[float]:
    """Sparsities ``offset + c · slope`` within 0 and `HIGHEST`, with the c that meets the target.

    The weighted mean grows with c, so c is found by bisection, to the last bit.
    """
    if target > HIGHEST:
        raise UsageError(
            f"{100 * target:g} % cannot be allocated: no block may lose more than "
            f"{100 * HIGHEST:g} %",
            "remove less, or allocate 'uniform'",
        )

    def ratios(c: float) -> list[float]:
        return [
            min(HIGHEST, max(0.0, offset + c * slope))
            for offset, slope in zip(offsets, slopes, strict=True)
        ]

    def removed(c: float) -> float:
        return math.fsum(map(math.prod, zip(weights, ratios(c), strict=True)))

    wanted = target * sum(weights)
    low = min(-offset / slope for offset, slope in zip(offsets, slopes, strict=True))
    high = max((HIGHEST - offset) / slope for offset, slope in zip(offsets, slopes, strict=True))
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if removed(middle) < wanted else (low, middle)
    return ratios(high)


def patterns_of(ratios: Sequence[float], pattern: Pattern, decimals: int = 2) -> list[Pattern]:
    """The patterns of blocks with these sparsities.

    Sparsities are rounded, so with two decimals their mean moves by 0.005 percentage points at
    most.

    Args:
        ratios: as `Allocation.ratios` gives them.
        pattern: the pattern asked for, whose R they keep.
        decimals: of the percentages.

    Raises:
        UsageError: the pattern is not ``P%``, or a sparsity is below 0 or not below 100 % (only
            with ``compat: reference``).
    """
    if pattern.is_nm or pattern.is_dense:
        raise UsageError(
            f"pattern '{pattern}' leaves nothing to allocate",
            "allocate a 'P%' pattern, or allocate 'uniform'",
        )
    blocks = f"@{pattern.rows}x1" if pattern.rows > 1 else ""
    patterns = []
    for ratio in ratios:
        percent = round(100 * ratio, decimals)
        if not 0 <= percent < 100:
            raise UsageError(
                f"the allocation removes {percent} % of a block",
                "use a smaller spread, or drop compat 'reference', which does not limit it",
            )
        text = f"{percent:.{decimals}f}%{blocks}"
        patterns.append(Pattern.parse(text) if percent > 0 else Pattern())
    return patterns


ALLOCATIONS: dict[str, Allocation] = {
    allocation.name: allocation
    for allocation in (
        Allocation(
            name="uniform",
            summary="the same sparsity in every block",
            source="-",
            needs="nothing",
            measurement=_no_measure,
            distribution=_same,
            settings=UniformSettings(),
        ),
        Allocation(
            name="owl",
            summary="blocks with more outliers among their scores keep more",
            source="Yin et al. 2024, section 3.2",
            needs="scores",
            measurement=_owl_measure,
            distribution=_owl_ratios,
            settings=OwlSettings(),
        ),
        Allocation(
            name="alphapruning",
            summary="blocks with heavier tails in their spectra keep more; reads no text",
            source="Lu et al. 2024, section 3",
            needs="weights",
            measurement=_alpha_measure,
            distribution=_alpha_ratios,
            settings=AlphaPruningSettings(),
        ),
    )
}


def find_allocation(name: str, settings: Mapping[str, Any] | None = None) -> Allocation:
    """Look an allocation up.

    Args:
        settings: values by field, e.g. ``{"threshold": 3}``.

    Raises:
        UsageError: a name or setting that is not known.
    """
    if name not in ALLOCATIONS:
        raise UsageError(f"there is no allocation {name!r}", did_you_mean(name, ALLOCATIONS))
    allocation = ALLOCATIONS[name]
    kind = type(allocation.settings)
    return replace(allocation, settings=validate(kind, dict(settings or {}), f"settings of {name}"))
