"""What a measurement returns: typed, versioned, and with the facts needed to repeat it."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from secateur.artifact import library_versions
from secateur.device import cpu_name

if TYPE_CHECKING:
    import torch


GateName = Literal["recovery", "perplexity_increase"]


class _Facts(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class Estimate(_Facts):
    """A ratio Σx/Σy over paired samples and how far to trust it.

    Attributes:
        value: Σx/Σy.
        stddev: spread of one sample's ratio about it; None for a single sample.
        standard_error: of the value itself, stddev/√n, were the samples independent.
    """

    value: float
    stddev: float | None
    standard_error: float | None

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Self:
        """The ratio of the sums of paired samples.

        To first order the ratio of pair i differs from R = Σx/Σy by (xᵢ - R·yᵢ) / mean(y), which
        counts what moves both alike (a busy machine, a hard text) once and not twice.
        """
        n = len(x)
        ratio = math.fsum(x) / math.fsum(y)
        if n < 2:
            return cls(value=ratio, stddev=None, standard_error=None)
        mean_y = math.fsum(y) / n
        residuals = [(a - ratio * b) / mean_y for a, b in zip(x, y, strict=True)]
        stddev = math.sqrt(math.fsum(r * r for r in residuals) / (n - 1))
        return cls(value=ratio, stddev=stddev, standard_error=stddev / math.sqrt(n))

    def exp(self) -> Self:
        """The exponential, its errors carried along to first order."""
        value = math.exp(self.value)
        return type(self)(
            value=value,
            stddev=None if self.stddev is None else value * self.stddev,
            standard_error=None if self.standard_error is None else value * self.standard_error,
        )


class Interval(_Facts):
    """A number and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


class Gate(_Facts):
    """What was asked of a number, and whether it is so.

    Attributes:
        path: the model.
        name: of the number: recovery or perplexity_increase.
        limit: the least recovery, or the greatest increase.
        value: what was measured; it alone decides.
        certain: whether all of the interval that belongs to the value is on the same side.
    """

    path: str
    name: GateName
    limit: float
    value: float
    passed: bool
    certain: bool


class Spread(_Facts):
    """Repeated measurements of one number: mean ± stddev, the extremes, and the raw samples."""

    mean: float
    stddev: float
    min: float
    max: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Describe two or more samples."""
        mean = math.fsum(samples) / len(samples)
        variance = math.fsum((s - mean) ** 2 for s in samples) / (len(samples) - 1)
        return cls(
            mean=mean,
            stddev=math.sqrt(variance),
            min=min(samples),
            max=max(samples),
            samples=tuple(samples),
        )


class Environment(_Facts):
    """Where and when a measurement was made.

    Attributes:
        cores: cores that this process may use.
        threads: threads that torch computes with.
        load_average: of the last minute, when the measurement began.
    """

    date: str
    cpu: str
    cores: int
    ram_bytes: int
    device: str
    threads: int
    load_average: float
    versions: dict[str, str]

    @classmethod
    def read(cls, device: torch.device) -> Self:
        """The facts of this machine, now."""
        import torch

        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            cpu=cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            load_average=os.getloadavg()[0],
            versions={
                "python": platform.python_version(),
                **library_versions("secateur", "torch", "transformers"),
            },
        )


class _Result(_Facts):
    """What every result holds.

    Attributes:
        command: the command line that made it, if one did.
        environment: where and when it was made.
        dtype: what was computed in.
        notes: what a reader must know before quoting it.
    """

    command: str = ""
    environment: Environment
    dtype: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain data, as ``--json`` prints it."""
        return self.model_dump(mode="json", by_alias=True)


class TextFacts(_Facts):
    """Which tokens were read: sha256 is of the evaluated ids as little-endian int64."""

    name: str
    tokenizer: str
    tokens: int
    evaluated_tokens: int
    sha256: str


class TaskScore(_Facts):
    """How one model did on one task.

    Attributes:
        name: of lm-eval, or the file's without its ending.
        sha256: of a file's items; None of lm-eval's own.
        acc: share of right answers, with its error over items.
        acc_norm: likewise, if lm-eval takes the choices' lengths into account; None if it cannot.
        recovery: acc / acc of the baseline, on the same items; None without a baseline, for it,
            and if it gives no right answer.
        right: of each item 1 or 0, for other tests than ours.
    """

    name: str
    sha256: str | None
    items: int
    acc: Estimate
    acc_norm: Estimate | None
    recovery: Interval | None
    right: tuple[float, ...]


class ModelAccuracy(_Facts):
    """How well one model predicts the text; what compares it is None for the baseline.

    Attributes:
        path: the directory as it was given.
        bytes: size of its weight files.
        nll: mean negative log-likelihood, nats per predicted token.
        perplexity: exp(nll).
        perplexity_ratio: to the baseline's, paired by window.
        kl: KL(baseline‖model), nats per predicted token.
        top1_agreement: fraction of tokens where both models prefer the same next token.
        topk_agreement: share of the baseline's k likeliest next tokens that are among its own.
        tasks: its scores; empty if none were asked for.
        recovery: mean acc over the tasks / the same of the baseline; None as in `TaskScore`.
        window_nll: the nats of each window, for other tests than ours.
    """

    path: str
    bytes: int
    nll: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate | None
    kl: Estimate | None
    top1_agreement: Estimate | None
    topk_agreement: Estimate | None = None
    tasks: tuple[TaskScore, ...] = ()
    recovery: Interval | None = None
    window_nll: tuple[float, ...]


class AccuracyResult(_Result):
    """The result of ``bench accuracy``; docs/bench.md explains every key.

    Attributes:
        top_k: the k of `ModelAccuracy.topk_agreement`.
        gates: what was asked of the models, one for each model and limit.
    """

    schema_: Literal["secateur/bench-accuracy/2"] = Field(
        "secateur/bench-accuracy/2", alias="schema"
    )
    top_k: int
    gates: tuple[Gate, ...] = ()
    text: TextFacts
    window: int
    stride: int
    windows: int
    predicted_tokens: int
    baseline: ModelAccuracy | None
    models: tuple[ModelAccuracy, ...]

    @property
    def everyone(self) -> tuple[ModelAccuracy, ...]:
        """The baseline, if there is one, and the models."""
        return (*((self.baseline,) if self.baseline else ()), *self.models)
