"""Prefill and decode speed of models side by side: one process, alternating order, raw samples.

A round runs every model once, in the given order in even rounds and in reverse in odd ones, so
that a machine that gets slower or faster treats all models alike. One run is a prefill (the
prompt, and the argmax of its last position) and `new_tokens` greedy steps with a KV cache.
"""

from __future__ import annotations

import inspect
import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur import recipe
from secateur.bench.results import Environment, Estimate, LatencyResult, ModelLatency, Spread
from secateur.bench.subjects import (
    check_models,
    model_bytes,
    notes_on,
    open_models,
)
from secateur.device import choose_device, choose_dtype
from secateur.progress import Tick, no_tick

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_FAR = 10 * 1.4826  # median absolute deviations: 10 σ of a normal distribution
_NOTICEABLE = 0.05  # fraction of the median below which a deviation does not matter


@dataclass(frozen=True)
class Timing:
    """Seconds that one model took in one round."""

    prefill: float
    decode: float


Runner = Callable[[], Timing]


def measure_latency(
    models: Sequence[str | Path],
    settings: recipe.Latency | None = None,
    *,
    against: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: Tick = no_tick,
) -> LatencyResult:
    """Time models against each other; all of them are in memory at once.

    Args:
        models: directories of dense, pruned or packed models.
        settings: prompt, new tokens, batch, rounds, seconds; None: the defaults.
        against: the model that the speed-ups refer to.
        dtype: compute type: float32, bfloat16, float16 or auto.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads of torch; None: as torch chooses.
        progress: called with (rounds done, rounds expected).

    Raises:
        ModelError: a model cannot be opened or reads fewer tokens than asked.
        UsageError: a dtype or device is unknown.
        EnvironmentFault: CUDA is asked for and absent.
    """
    from secateur.serve.linear import kernel_report

    settings = settings or recipe.Latency()
    place = choose_device(device)
    dtype, note = choose_dtype(dtype, place)
    paths = [*([against] if against is not None else []), *models]
    check_models(paths, settings.prompt + settings.new_tokens)
    with _threads(threads):
        environment = Environment.read(place)
        opened = open_models(paths, dtype, place)
        runners = [_runner(model, settings, place) for model in opened]
        for run in runners:
            run()  # warm-up: first touch of the weights, thread pools, kernel selection
        begun = time.perf_counter()
        timings = interleave(runners, settings.rounds, settings.min_seconds, progress=progress)
        seconds = time.perf_counter() - begun
    kernels = [
        f"{path}: {use}"
        for path, model in zip(paths, opened, strict=True)
        for use in kernel_report(model)
    ]
    rows = [
        _row(path, model, own, timings[0] if against is not None else None, settings)
        for path, model, own in zip(paths, opened, timings, strict=True)
    ]
    if against is not None:
        rows[0] = rows[0].model_copy(update={"prefill_speedup": None, "decode_speedup": None})
    return LatencyResult(
        environment=environment,
        dtype=dtype,
        notes=(
            *([note] if note else []),
            *notes_on(paths),
            *kernels,
            *_notes_on_machine(environment),
        ),
        prompt=settings.prompt,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        rounds=len(timings[0]),
        measured_seconds=seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        baseline=rows[0] if against is not None else None,
        models=tuple(rows[1:] if against is not None else rows),
    )


def interleave(
    runners: Sequence[Runner],
    rounds: int,
    min_seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Tick = no_tick,
) -> list[list[Timing]]:
    """Run rounds until there are enough of them and enough time has passed.

    Returns:
        For each runner its timings, one a round.
    """
    timings: list[list[Timing]] = [[] for _ in runners]
    order = list(zip(runners, timings, strict=True))
    begun, elapsed, done = clock(), 0.0, 0
    while done < rounds or elapsed < min_seconds:
        for run, own in order if done % 2 == 0 else reversed(order):
            own.append(run())
        done += 1
        elapsed = clock() - begun
        by_time = math.ceil(min_seconds * done / elapsed) if elapsed > 0 else rounds
        progress(done, max(rounds, done, by_time))
    return timings


def warnings_on(name: str, seconds: Sequence[float]) -> list[str]:
    """Say which samples of a timing look like something else than the model.

    A sample is far out if it lies both 10 σ (estimated from the median absolute deviation) and
    5 % from the median.
    """
    median = statistics.median(seconds)
    deviation = statistics.median(abs(s - median) for s in seconds)
    limit = max(_FAR * deviation, _NOTICEABLE * median)
    far = [round_ for round_, s in enumerate(seconds) if abs(s - median) > limit]
    if far == [0] and seconds[0] > median:
        return [
            f"{name}: the first round was slow ({seconds[0]:.3g} s, median {median:.3g} s) despite "
            "the warm-up: caches were cold or the clock was rising; more --rounds dilute it"
        ]
    if far:
        return [
            f"{name}: {len(far)} of {len(seconds)} rounds far from the median {median:.3g} s "
            f"({min(seconds):.3g} … {max(seconds):.3g} s): stop other programs, or raise "
            "--rounds or --min-seconds"
        ]
    return []


def _runner(model: PreTrainedModel, settings: recipe.Latency, device: torch.device) -> Runner:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.prompt)
    prompt = torch.randint(
        model.config.get_text_config().vocab_size, shape, generator=generator
    ).to(device)
    keywords = {"use_cache": True, **_last_position(model)}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @torch.inference_mode()
    def run() -> Timing:
        begun = now()
        output = model(input_ids=prompt, **keywords)
        token = output.logits[:, -1:].argmax(-1)
        filled = now()
        for _ in range(settings.new_tokens):
            output = model(input_ids=token, past_key_values=output.past_key_values, **keywords)
            token = output.logits[:, -1:].argmax(-1)
        return Timing(prefill=filled - begun, decode=now() - filled)

    return run


def _last_position(model: PreTrainedModel) -> dict[str, int]:
    """The keyword that limits the logits to the last position, where the architecture has it."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def _row(
    path: str | Path,
    model: PreTrainedModel,
    timings: Sequence[Timing],
    baseline: Sequence[Timing] | None,
    settings: recipe.Latency,
) -> ModelLatency:
    from secateur.serve.linear import kernel_report

    prefill, decode = _rates(timings, settings)
    warnings = [
        *warnings_on("prefill", [timing.prefill for timing in timings]),
        *warnings_on("decode", [timing.decode for timing in timings]),
    ]
    if not _last_position(model):
        warnings.append("prefill: computes the logits of every position, not only of the last")
    prefill_speedup = decode_speedup = None
    if baseline is not None:
        base_prefill, base_decode = _rates(baseline, settings)
        prefill_speedup = Estimate.of(prefill, base_prefill)
        decode_speedup = Estimate.of(decode, base_decode)
    leaves = (module for module in model.modules() if next(module.children(), None) is None)
    tensors = [*model.parameters(), *model.buffers()]
    return ModelLatency(
        path=str(path),
        bytes=model_bytes(path),
        memory_bytes=sum(tensor.nbytes for tensor in tensors)
        + sum(use.nbytes for use in kernel_report(model) if use.path == "kernels"),
        modules=dict(Counter(type(module).__name__ for module in leaves).most_common()),
        prefill_tokens_per_s=Spread.of(prefill),
        decode_tokens_per_s=Spread.of(decode),
        prefill_speedup=prefill_speedup,
        decode_speedup=decode_speedup,
        warnings=tuple(warnings),
    )


def _rates(timings: Sequence[Timing], settings: recipe.Latency) -> tuple[list[float], list[float]]:
    """Tokens per second of each round, all sequences together: prefill, decode."""
    return (
        [settings.batch * settings.prompt / timing.prefill for timing in timings],
        [settings.batch * settings.new_tokens / timing.decode for timing in timings],
    )


def _notes_on_machine(environment: Environment) -> list[str]:
    if environment.load_average > environment.cores / 2:
        return [
            f"the machine was busy before the measurement began (load average "
            f"{environment.load_average:.1f} on {environment.cores} cores)"
        ]
    return []


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
