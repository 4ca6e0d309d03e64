"""What `bench latency` finds: rates at every load, where they cross, the time of each linear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field

from secateur.bench.results import Estimate, Spread, _Facts, _Result

Phase = Literal["prefill", "decode"]


class PointLatency(_Facts):
    """How fast one model is with one prompt length and batch; speed-ups are None for the baseline.

    Attributes:
        prefill_tokens_per_s, decode_tokens_per_s: over all sequences of the batch.
        prefill_speedup, decode_speedup: ratio of the mean rates, model/baseline, paired by round.
        joules: of a run, prefill and decode, by all that ran on the processor meanwhile; None where
            the machine does not tell (`LatencyResult.energy`).
        warnings: what makes the numbers doubtful.
    """

    prompt: int
    batch: int
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    prefill_speedup: Estimate | None
    decode_speedup: Estimate | None
    joules: Spread | None
    warnings: tuple[str, ...]

    def rate(self, phase: Phase) -> Spread:
        """Tokens per second of a phase."""
        return self.prefill_tokens_per_s if phase == "prefill" else self.decode_tokens_per_s

    def speedup(self, phase: Phase) -> Estimate | None:
        """The speed-up of a phase."""
        return self.prefill_speedup if phase == "prefill" else self.decode_speedup


class LinearFacts(_Facts):
    """What computes one linear of a model.

    Attributes:
        name: of the module.
        layout: the form in which the weight lies in memory; "torch" of a dense weight of torch's.
        values: type of the weights as they are multiplied.
        activations: type that the inputs are rounded to.
        nbytes: of the layout, scales and positions included.
        why: why a sparse weight is stored dense; None if it is not.
    """

    name: str
    rows: int
    columns: int
    layout: str
    values: str
    activations: str
    nbytes: int
    why: str | None


class LayerTime(LinearFacts):
    """The time of one linear.

    Attributes:
        tokens: inputs that are multiplied at once.
        us: microseconds of each round.
    """

    tokens: int
    us: Spread


class ModelLatency(_Facts):
    """How fast one model is.

    Attributes:
        path: the directory or file as it was given.
        engine: what ran it.
        bytes: size of its weight files.
        memory_bytes: size of its weights in memory, in whatever forms.
        modules: what computed: number of innermost modules by class, or of linears by layout.
        points: in the order of `LatencyResult.prompt` and, within, `batch`.
        layers: every linear, in the order of the model, for each batch; empty unless asked for.
    """

    path: str
    engine: str
    bytes: int
    memory_bytes: int
    modules: dict[str, int]
    points: tuple[PointLatency, ...]
    layers: tuple[LayerTime, ...]


class Crossover(_Facts):
    """Where a model stops, or begins, to be faster than the baseline.

    Attributes:
        batch: at which the speed-up is 1, by interpolation over the logarithm of the batch between
            the two measured ones that lie around it.
        faster: on which side the model is the faster one.
    """

    path: str
    phase: Phase
    prompt: int
    batch: float
    faster: Literal["below", "above"]


class LatencyResult(_Result):
    """The result of ``bench latency``; docs/bench.md explains every key.

    Attributes:
        prompt, batch: every pair of them is a point.
        rounds: fewest rounds of a point.
        peak_rss_bytes: the most memory this process ever held, all models together.
        energy: what was counted, or why nothing was.
    """

    schema_: Literal["secateur/bench-latency/3"] = Field("secateur/bench-latency/3", alias="schema")
    prompt: tuple[int, ...]
    new_tokens: int
    batch: tuple[int, ...]
    rounds: int
    measured_seconds: float
    peak_rss_bytes: int
    energy: str
    crossovers: tuple[Crossover, ...]
    baseline: ModelLatency | None
    models: tuple[ModelLatency, ...]

    @property
    def everyone(self) -> tuple[ModelLatency, ...]:
        """The baseline, if there is one, and the models."""
        return (*((self.baseline,) if self.baseline else ()), *self.models)


def find_crossovers(models: Sequence[ModelLatency]) -> list[Crossover]:
    """All changes of sign of (speed-up - 1) between neighbouring batches of one prompt length."""
    return [
        crossover
        for model in models
        for phase in ("prefill", "decode")
        for prompt in dict.fromkeys(point.prompt for point in model.points)
        for crossover in _crossovers_of(model, phase, prompt)
    ]


def _crossovers_of(model: ModelLatency, phase: Phase, prompt: int) -> list[Crossover]:
    curve = sorted(
        (point.batch, speedup.value - 1)
        for point in model.points
        if point.prompt == prompt and (speedup := point.speedup(phase)) is not None
    )
    found = []
    for (left, before), (right, after) in pairwise(curve):
        if (before > 0) != (after > 0):
            part = before / (before - after)
            batch = math.exp((1 - part) * math.log(left) + part * math.log(right))
            side: Literal["below", "above"] = "below" if before > 0 else "above"
            found.append(
                Crossover(path=model.path, phase=phase, prompt=prompt, batch=batch, faster=side)
            )
    return found
