"""Our CPU kernels against our own dense kernel, torch and ONNX Runtime, taking turns in one run.

A group is one shape, value type, number of tokens and of threads. In each of its rounds every
kernel runs once, in a new random order, for at least so many milliseconds; ratios are of times
of the same round. Every kernel has several copies of its weight and takes them in turn, so that
weights come from memory, as they do when a model decodes.

The kernels are handed in (`Kernels`), since this stage does not import the one they are in.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from secateur.bench.kernel_group import Kernels, Plan, ShapeBench
from secateur.bench.kernel_results import KernelGroup, KernelSettings, KernelsResult, Roof
from secateur.bench.results import Environment, Spread
from secateur.bench.subjects import notes_on_machine
from secateur.device import choose_device
from secateur.progress import Tick, no_tick

_DEFAULT_CACHE = 32 * 2**20  # where the system does not say


def measure_kernels(
    kernels: Kernels,
    settings: KernelSettings | None = None,
    *,
    command: str = "",
    progress: Tick = no_tick,
) -> KernelsResult:
    """Time all kernels of all groups; one shape and value type is in memory at a time.

    Args:
        kernels: the module `secateur.compile.cpu`.
        settings: what and how; None: the defaults.
        command: kept in the result.
        progress: called with (groups done, groups in all).

    Raises:
        UsageError: the weights do not fit into the memory allowed.
        SecateurError: one of our kernels computes something else than numpy.
    """
    cache = last_level_cache()
    settings = resolved(settings or KernelSettings(), cache)
    for shape in settings.shapes:
        for kind in settings.values:
            Plan.of(settings, shape, kind)  # refused now, not after an hour
    total = math.prod(map(len, (settings.shapes, settings.values, settings.threads)))
    total *= len(settings.tokens)
    with threads_restored(kernels):
        environment = kernel_environment()
        begun = time.perf_counter()
        before = _roofs(kernels, settings)
        groups: list[KernelGroup] = []
        notes: list[str] = []
        for shape in settings.shapes:
            for kind in settings.values:
                for group in ShapeBench(kernels, settings, shape, kind, notes).groups():
                    groups.append(group)
                    progress(len(groups), total)
        after = _roofs(kernels, settings)
        seconds = time.perf_counter() - begun
    roofs = {
        count: Roof(threads=count, before=before[count], after=after[count])
        for count in settings.threads
    }
    return KernelsResult(
        environment=environment,
        dtype="float32",
        notes=(*notes_on_machine(environment), *dict.fromkeys(notes)),
        command=command,
        isa=kernels.isa(),
        settings=settings,
        last_level_cache_bytes=cache,
        measured_seconds=seconds,
        roofs=tuple(roofs.values()),
        groups=tuple(
            group.model_copy(
                update={"kernels": tuple(row.under(roofs[group.threads]) for row in group.kernels)}
            )
            for group in groups
        ),
    )


def resolved(settings: KernelSettings, cache: int | None) -> KernelSettings:
    """The settings with numbers for what this machine decides."""
    update = {}
    if settings.cache_bytes is None:
        update["cache_bytes"] = 2 * (cache or _DEFAULT_CACHE) + 96 * 2**20
    if settings.memory_bytes is None:
        update["memory_bytes"] = free_memory() // 2
    return settings.model_copy(update=update)


def last_level_cache(cpus: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of the last-level caches of all cores, each cache counted once; None if unknown."""
    levels: dict[int, dict[str, int]] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index*"):
        try:
            size, shared, level = (
                (index / name).read_text().strip() for name in ("size", "shared_cpu_list", "level")
            )
        except OSError:
            continue
        unit = {"K": 2**10, "M": 2**20}.get(size[-1:], 1)
        levels.setdefault(int(level), {})[shared] = int(size.rstrip("KM")) * unit
    return sum(levels[max(levels)].values()) if levels else None


def free_memory() -> int:
    """Bytes that the machine could still give."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


def _roofs(kernels: Kernels, settings: KernelSettings) -> dict[int, Spread]:
    roofs = {}
    for count in settings.threads:
        kernels.set_threads(count)
        roofs[count] = Spread.of(
            list(kernels.read_bandwidth(settings.roof_mib * 2**20, max(2, settings.rounds)))
        )
    return roofs


def kernel_environment() -> Environment:
    """This machine, with the versions of numpy and, if there, ONNX Runtime."""
    environment = Environment.read(choose_device("cpu"))
    versions = dict(environment.versions)
    for name in ("numpy", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return environment.model_copy(update={"versions": versions})


@contextmanager
def threads_restored(kernels: Kernels) -> Iterator[None]:
    """Give torch and the kernels back the threads that they had."""
    import torch

    before = kernels.threads(), torch.get_num_threads()
    try:
        yield
    finally:
        kernels.set_threads(before[0])
        torch.set_num_threads(before[1])
