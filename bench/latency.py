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
from dataclasses import replace
from pathlib import Path

from secateur import recipe
from secateur.bench.energy import EnergyMeter
from secateur.bench.latency_results import (
    LatencyResult,
    ModelLatency,
    PointLatency,
    find_crossovers,
)
from secateur.bench.layers import time_layers
from secateur.bench.onnx_runner import open_onnx, open_onnx_directory
from secateur.bench.results import Environment, Estimate, Spread
from secateur.bench.runners import (
    Runner,
    Subject,
    Timing,
    Workload,
    choose_engine,
    is_file,
    is_onnx,
    open_llama_cpp,
    open_native,
    open_transformers,
)
from secateur.bench.subjects import check_models, notes_on, notes_on_machine
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
    layers: bool = False,
    command: str = "",
    providers: Sequence[str] = (),
    progress: Tick = no_tick,
) -> LatencyResult:
    """Time models against each other; all of them are in memory at once.

    Args:
        models: directories of dense, pruned or packed models, run by one engine; ONNX ones, run by
            ONNX Runtime; or files: .gguf, run by llama.cpp, .onnx, by ONNX Runtime or OpenVINO.
        settings: prompts, new tokens, batches, rounds, seconds; None: the defaults.
        against: the model that the speed-ups refer to.
        engine: transformers, native, or auto: native where it can run all of the directories;
            openvino: auto, and OpenVINO for .onnx files.
        dtype: compute type of transformers: float32, bfloat16, float16 or auto.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; None: all cores of this process.
        head_values: value type of the head in the native engine, as in ``secateur serve``.
        layers: also time every linear by itself, with as many tokens as each batch has sequences.
        command: kept in the result.
        providers: execution providers of ONNX Runtime, as in ``secateur serve``.
        progress: called with (rounds done, rounds expected) of each point.

    Raises:
        ModelError: a model cannot be opened or reads fewer tokens than asked.
        UsageError: an engine, dtype or device is unknown, or they do not go together.
        EnvironmentFault: CUDA or the program that runs a file is absent.
    """
    settings = settings or recipe.Latency()
    loads = [
        Workload(prompt, settings.new_tokens, batch)
        for prompt in settings.prompt
        for batch in settings.batch
    ]
    place = choose_device(device)
    paths = [*([against] if against is not None else []), *models]
    directories = [path for path in paths if not is_file(path) and not is_onnx(path)]
    if directories or not paths:
        check_models(directories, max(settings.prompt) + settings.new_tokens)
    onnx = "onnxruntime"
    if engine == "openvino":
        engine, onnx = "auto", engine
    engine, remark = choose_engine(engine, paths, place.type, dtype)
    native, note = engine == "native", None
    if not native:
        dtype, note = choose_dtype(dtype, place)
    threads = threads or len(os.sched_getaffinity(0))

    def open_one(path: str | Path) -> Subject:
        if Path(path).suffix == ".gguf":
            return open_llama_cpp(path, loads, threads)
        if Path(path).suffix == ".onnx":
            return open_onnx(path, onnx, threads)
        if is_onnx(path):
            return open_onnx_directory(
                path, max(settings.prompt) + settings.new_tokens, threads, providers
            )
        if native:
            return open_native(path, loads, threads, head_values)
        return open_transformers(path, dtype, place)

    with _threads(threads):
        environment = Environment.read(place)
        subjects = [open_one(path) for path in paths]
        meter, begun = EnergyMeter(), time.perf_counter()
        rows = _run_all(subjects, loads, settings, meter, against is not None, progress)
        seconds = time.perf_counter() - begun
        if layers:
            linears = [subject.linears for subject in subjects]
            times = time_layers(linears, settings.batch, settings.rounds)
            rows = [
                row.model_copy(update={"layers": own}) for row, own in zip(rows, times, strict=True)
            ]
    return LatencyResult(
        command=command,
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
        rounds=settings.rounds,
        measured_seconds=seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        energy=meter.description,
        crossovers=tuple(find_crossovers(rows)),
        baseline=rows[0] if against is not None else None,
        models=tuple(rows[1:] if against is not None else rows),
    )


def _run_all(
    subjects: Sequence[Subject],
    loads: Sequence[Workload],
    settings: recipe.Latency,
    meter: EnergyMeter,
    compared: bool,
    progress: Tick,
) -> list[ModelLatency]:
    """Run open models in turns, load after load; with ``compared`` the first is the baseline."""
    points: list[list[PointLatency]] = [[] for _ in subjects]
    for load in loads:
        runners = [_metered(subject, load, meter) for subject in subjects]
        for run in runners:
            run()  # warm-up: first touch of the weights, thread pools, kernel selection
        timings = interleave(runners, settings.rounds, settings.min_seconds, progress=progress)
        for number, (subject, own) in enumerate(zip(subjects, timings, strict=True)):
            base = timings[0] if compared and number else None
            points[number].append(_point(subject, load, own, base))
    return [
        ModelLatency(
            path=subject.path,
            engine=subject.engine,
            bytes=subject.bytes,
            memory_bytes=subject.memory_bytes,
            modules=subject.modules,
            points=tuple(own),
            layers=(),
        )
        for subject, own in zip(subjects, points, strict=True)
    ]


def _metered(subject: Subject, load: Workload, meter: EnergyMeter) -> Runner:
    """One run, with the energy that it took."""

    def run() -> Timing:
        before = meter.read()
        timing = subject.run(load)
        after = meter.read()
        joules = None if before is None or after is None else after - before
        return replace(timing, joules=joules)

    return run


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


def _point(
    subject: Subject, load: Workload, timings: Sequence[Timing], baseline: Sequence[Timing] | None
) -> PointLatency:
    prefill, decode = _rates(timings, load)
    prefill_speedup = decode_speedup = None
    if baseline is not None:
        base_prefill, base_decode = _rates(baseline, load)
        prefill_speedup = Estimate.of(prefill, base_prefill)
        decode_speedup = Estimate.of(decode, base_decode)
    joules = [timing.joules for timing in timings if timing.joules is not None]
    return PointLatency(
        prompt=load.prompt,
        batch=load.batch,
        prefill_tokens_per_s=Spread.of(prefill),
        decode_tokens_per_s=Spread.of(decode),
        prefill_speedup=prefill_speedup,
        decode_speedup=decode_speedup,
        joules=Spread.of(joules) if joules else None,
        warnings=(
            *warnings_on("prefill", [timing.prefill for timing in timings]),
            *warnings_on("decode", [timing.decode for timing in timings]),
            *subject.warnings,
        ),
    )


def _rates(timings: Sequence[Timing], load: Workload) -> tuple[list[float], list[float]]:
    """Tokens per second of each round, all sequences together: prefill, decode."""
    return (
        [load.batch * load.prompt / timing.prefill for timing in timings],
        [load.batch * load.new_tokens / timing.decode for timing in timings],
    )


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
