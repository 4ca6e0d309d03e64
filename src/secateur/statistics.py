"""What calibration learns about a linear layer: its inputs, and the gradients of its weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch

# Tokens per layer on which the relative output error is measured without a Gram matrix.
PROBE_TOKENS = 1024

_T = TypeVar("_T")
Need = Literal["norms", "gram", "moments", "probe", "gradients", "regional"]


class InputStatistics:
    """Running statistics of the inputs X of one linear, fed one batch of sequences at a time.

    Args:
        width: inputs of the linear.
        sequences: how many will be fed.
        device: where to keep the sums.
        needs: what to collect beside the norms. "gram": `gram`. "moments": `sequence_sum`,
            `within_variance`, `mean` and `variance`. "probe": `probe`, which is also there
            without "gram". Asking for what was not collected is an error.

    Attributes:
        sequences, tokens: how many were seen.
        square_norm: ``[in]`` fp32, mean over sequences of Σ_tokens x² (Wanda's ``scaler_row``,
            Sun et al. 2023, eq. 1, before the root).
    """

    def __init__(
        self,
        width: int,
        sequences: int,
        device: torch.device,
        needs: frozenset[Need] = frozenset({"norms"}),
    ) -> None:
        import torch

        self.sequences = 0
        self.tokens = 0
        self.square_norm = torch.zeros(width, device=device)
        self._gram = torch.zeros(width, width, device=device) if "gram" in needs else None
        self._moments = _Moments(width, device) if "moments" in needs else None
        self._probes = "probe" in needs or "gram" not in needs
        self._probe: list[torch.Tensor] = []
        self._probe_per_sequence = -(-PROBE_TOKENS // sequences)
        self._derived: dict[Hashable, Any] = {}

    def update(self, inputs: torch.Tensor) -> None:
        """Add a batch: ``[sequences, tokens, in]``."""
        import torch

        batch, length, width = inputs.shape
        if length == 0:  # an expert that no token of these sequences was routed to
            self.square_norm *= self.sequences / (self.sequences + batch)
            self.sequences += batch
            return
        values = inputs.float()
        flat = values.reshape(-1, width)
        if self._moments is not None:
            self._moments.update(values, self.sequences, self.tokens)
        # The authors' order of operations, so that the scores are theirs to the last bit.
        self.square_norm *= self.sequences / (self.sequences + batch)
        self.sequences += batch
        self.tokens += batch * length
        self.square_norm += torch.linalg.vector_norm(flat.t(), dim=1) ** 2 / self.sequences
        if self._gram is not None:
            # One addition a batch: the rounding of 128 of them stays far below the damping.
            self._gram.addmm_(flat.t(), flat)
        if self._probes:
            step = -(-length // self._probe_per_sequence)
            if sum(map(len, self._probe)) < PROBE_TOKENS:
                self._probe.append(values[:, ::step].reshape(-1, width).clone())

    def derived(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """What ``compute`` made of these statistics for an earlier linear with the same inputs.

        Args:
            key: names the computation and its settings.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        value: _T = self._derived[key]
        return value

    def forget(self) -> None:
        """Drop what was `derived`."""
        self._derived.clear()

    @property
    def gram(self) -> torch.Tensor:
        """``[in, in]`` fp32, Σ x xᵀ over all tokens."""
        return _collected(self._gram, "gram")

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix is collected."""
        return self._gram is not None

    @property
    def probe(self) -> torch.Tensor:
        """``[tokens, in]`` fp32, about `PROBE_TOKENS` inputs spread evenly over the sequences."""
        import torch

        kept = _collected(self._probe if self._probes else None, "probe")
        return torch.cat(kept) if kept else self.square_norm.new_zeros(0, len(self.square_norm))

    @property
    def sequence_sum(self) -> torch.Tensor:
        """``[in]`` fp32, mean over sequences of Σ_tokens x (DSnoT's ``sum_metric_row``)."""
        return _collected(self._moments, "moments").sequence_sum

    @property
    def within_variance(self) -> torch.Tensor:
        """``[in]`` fp32, token-weighted mean of the variances inside sequences (DSnoT's ``var``).

        What differs between sequences is not in it; `variance` has it.
        """
        return _collected(self._moments, "moments").within_variance

    @property
    def mean(self) -> torch.Tensor:
        """``[in]`` fp32, mean over all tokens."""
        return _collected(self._moments, "moments").mean.float()

    @property
    def variance(self) -> torch.Tensor:
        """``[in]`` fp32, population variance over all tokens."""
        return (_collected(self._moments, "moments").squares / max(1, self.tokens)).float()

    def relative_error(self, before: torch.Tensor, after: torch.Tensor) -> float:
        """‖(W - Ŵ)X‖² / ‖WX‖², exact with a Gram matrix, else on about `PROBE_TOKENS` tokens.

        Args:
            before, after: ``[out, in]``.
        """
        import torch

        def power_of(weight: torch.Tensor) -> torch.Tensor:
            if self._gram is not None:
                return ((weight @ self._gram) * weight).sum(dtype=torch.float64)
            return (self.probe @ weight.t()).square().sum().double()

        power = power_of(before)
        return max(0.0, float(power_of(before - after) / power)) if power > 0 else 0.0


class _Moments:
    """First and second moments, as DSnoT computes them and as they are."""

    def __init__(self, width: int, device: torch.device) -> None:
        import torch

        self.sequence_sum = torch.zeros(width, device=device)
        self.within_variance = torch.zeros(width, device=device)
        self.mean = torch.zeros(width, device=device, dtype=torch.float64)
        self.squares = torch.zeros(width, device=device, dtype=torch.float64)

    def update(self, values: torch.Tensor, sequences: int, tokens: int) -> None:
        """Add ``[sequences, tokens, in]`` to what ``sequences`` and ``tokens`` went before."""
        import torch

        batch, length, _ = values.shape
        new, all_tokens = batch * length, tokens + batch * length
        self.sequence_sum *= sequences / (sequences + batch)
        self.sequence_sum += values.sum(dim=(0, 1)) / (sequences + batch)
        # Over a transposed copy: the order of summation that the authors' numbers come from.
        inside = torch.var(values.mT, dim=2, unbiased=False).mean(dim=0)
        self.within_variance = (self.within_variance * tokens + inside * new) / all_tokens
        variance, mean = torch.var_mean(values.double(), dim=(0, 1), correction=0)
        shift = mean - self.mean
        self.mean = self.mean + shift * (new / all_tokens)
        self.squares = self.squares + variance * new + shift**2 * (tokens * new / all_tokens)


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Norms over samples of the gradients of a weight.

    Attributes:
        norms: ``[out, in]`` fp32: of each weight Σ|g| (l1) or the root of Σ g² (l2), times `scale`.
        norm: which of the two.
        samples: how many gradients.
        scale: what the gradients were multiplied by.
    """

    norms: torch.Tensor
    norm: Literal["l1", "l2"]
    samples: int
    scale: float


class GradientStatistics:
    """Sums up the gradients of a weight, one sample at a time.

    Args:
        norm: "l1" sums |g|; "l2" takes the root of the sum of g².
        half: store what GBLM's code stores: gradients scaled by 100, l1 summed in fp16 (which
            saturates: 4096 times 0.05 is 128 there), l2 rounded to fp16.
    """

    def __init__(self, norm: Literal["l1", "l2"] = "l2", half: bool = False) -> None:
        self.norm = norm
        self.half = half
        self.samples = 0
        self._sum: torch.Tensor | None = None

    def update(self, gradient: torch.Tensor) -> None:
        """Add one sample's gradient: ``[out, in]``."""
        scaled = gradient.float() * gradient_scale(self.half)
        term = scaled.abs() if self.norm == "l1" else scaled.square_()
        if self.half and self.norm == "l1":
            term = term.half()
        self._sum = term if self._sum is None else self._sum.add_(term)
        self.samples += 1

    def result(self) -> GradientNorms:
        """The norms of the gradients so far."""
        total = _collected(self._sum, "gradients")
        norms = total if self.norm == "l1" else total.sqrt()
        norms = norms.half().float() if self.half else norms
        return GradientNorms(norms, self.norm, self.samples, gradient_scale(self.half))


def gradient_scale(half: bool) -> float:
    """What gradients are multiplied by: 100 in GBLM's code, against the underflow of fp16."""
    return 100.0 if half else 1.0


def _collected(value: _T | None, need: Need) -> _T:
    if value is None:
        raise RuntimeError(
            f"the statistics {need!r} were not collected: a method must declare them"
        )
    return value
