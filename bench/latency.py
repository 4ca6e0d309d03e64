"""Prefill and decode speed of models side by side: one process, alternating order, raw samples.

A round runs every model once, in the given order in even rounds and in reverse in odd ones, so
that a machine that gets slower or faster treats all models alike.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from secateur import recipe
from secateur.bench.results import Environment, Estimate, LatencyResult, ModelLatency, Spread
from secateur.bench.runners import (
    Runner,
    Subject,
    Timing,
    choose_engine,
    is_gguf,
    is_onnx,
    open_llama_cpp,
    open_native,
    open_onnx,
    open_transformers,
)
from secateur.bench.subjects import check_models, notes_on
from secateur.device import choose_device, choose_dtype
from secateur.progress import Tick, no_tick

_FAR = 10 * 1.4826  # median absolute deviations: 10 σ of a normal distribution
_NOTICEABLE = 0.05  # fraction of the median below which a deviation does not matter


def measure_latency(
    models: Sequence[str | Path],
    settings: recipe.Latency | None = None,
    *,
    against: str | Path | None = None,
    engine: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    head_values: str = "auto",
    providers: Sequence[str] = (),
    progress: Tick = no_tick,
) -> LatencyResult:
    """Time models against each other; all of them are in memory at once.

    Args:
        models: directories of dense, pruned or packed models, run by one engine; ONNX ones, run
            by ONNX Runtime; or .gguf files, run by llama.cpp.
        settings: prompt, new tokens, batch, rounds, seconds; None: the defaults.
        against: the model that the speed-ups refer to.
        engine: transformers, native, or auto: native where it can run all of the directories.
        dtype: compute type of transformers: float32, bfloat16, float16 or auto.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; None: all cores of this process.
        head_values: value type of the head in the native engine, as in ``secateur serve``.
        providers: execution providers of ONNX Runtime, as in ``secateur serve``.
        progress: called with (rounds done, rounds expected).

    Raises:
        ModelError: a model cannot be opened or reads fewer tokens than asked.
        UsageError: an engine, dtype or device is unknown, or they do not go together.
        EnvironmentFault: CUDA or llama.cpp is asked for and absent.
    """
    settings = settings or recipe.Latency()
    place = choose_device(device)
    paths = [*([against] if against is not None else []), *models]
    directories = [path for path in paths if not is_gguf(path) and not is_onnx(path)]
    if directories or not paths:
        check_models(directories, settings.prompt + settings.new_tokens)
    engine, remark = choose_engine(engine, paths, place.type, dtype)
    native, note = engine == "native", None
    if not native:
        dtype, note = choose_dtype(dtype, place)
    threads = threads or len(os.sched_getaffinity(0))

    def open_one(path: str | Path) -> Subject:
        if is_gguf(path):
            return open_llama_cpp(path, settings, threads)
        if is_onnx(path):
            return open_onnx(path, settings, threads, providers)
        if native:
            return open_native(path, settings, threads, head_values)
        return open_transformers(path, settings, dtype, place)

    with _threads(threads):
        environment = Environment.read(place)
        subjects = [open_one(path) for path in paths]
        for subject in subjects:
            subject.run()  # warm-up: first touch of the weights, thread pools, kernel selection
        begun = time.perf_counter()
        runners = [subject.run for subject in subjects]
        timings = interleave(runners, settings.rounds, settings.min_seconds, progress=progress)
        seconds = time.perf_counter() - begun
    base = timings[0] if against is not None else None
    rows = [_row(*both, base, settings) for both in zip(subjects, timings, strict=True)]
    if against is not None:
        rows[0] = rows[0].model_copy(update={"prefill_speedup": None, "decode_speedup": None})
    return LatencyResult(
        environment=environment,
        dtype="that of the weights" if native else dtype,
        notes=(
            *(said for said in (remark, note) if said),
            *(() if native else notes_on(directories)),
            *(f"{subject.path}: {text}" for subject in subjects for text in subject.notes),
            *notes_on_machine(environment),
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


def _row(
    subject: Subject,
    timings: Sequence[Timing],
    baseline: Sequence[Timing] | None,
    settings: recipe.Latency,
) -> ModelLatency:
    prefill, decode = _rates(timings, settings)
    prefill_speedup = decode_speedup = None
    if baseline is not None:
        base_prefill, base_decode = _rates(baseline, settings)
        prefill_speedup = Estimate.of(prefill, base_prefill)
        decode_speedup = Estimate.of(decode, base_decode)
    return ModelLatency(
        path=subject.path,
        engine=subject.engine,
        bytes=subject.bytes,
        memory_bytes=subject.memory_bytes,
        modules=subject.modules,
        prefill_tokens_per_s=Spread.of(prefill),
        decode_tokens_per_s=Spread.of(decode),
        prefill_speedup=prefill_speedup,
        decode_speedup=decode_speedup,
        warnings=(
            *warnings_on("prefill", [timing.prefill for timing in timings]),
            *warnings_on("decode", [timing.decode for timing in timings]),
            *subject.warnings,
        ),
    )


def _rates(timings: Sequence[Timing], settings: recipe.Latency) -> tuple[list[float], list[float]]:
    """Tokens per second of each round, all sequences together: prefill, decode."""
    return (
        [settings.batch * settings.prompt / timing.prefill for timing in timings],
        [settings.batch * settings.new_tokens / timing.decode for timing in timings],
    )


def notes_on_machine(environment: Environment) -> list[str]:
    """What of the machine makes the figures doubtful."""
    if environment.load_average > environment.cores / 2:
        return [
            f"the machine was busy before the measurement began (load average "
            f"{environment.load_average:.1f} on {environment.cores} cores)"
        ]
    return []


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
