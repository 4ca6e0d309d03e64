"""Our GPU kernels against cuBLAS on the dense weight, taking turns in one run.

As of `secateur.bench.kernels`: in each round every kernel runs once, in a new random order; ratios
are of times of the same round; every kernel takes several copies of its weight in turn, which
together overflow the GPU's cache. What is timed is a CUDA graph of one product with each copy, so
without the cost of launching kernels from Python.

The kernels are handed in (`HoldEach`), since this stage does not import the one they are in.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field

from secateur.bench.kernel_group import copies_of
from secateur.bench.kernel_results import CONTROL, KernelRow, KernelSettings
from secateur.bench.kernel_rounds import Runner, time_rounds
from secateur.bench.kernel_weights import Array, ValueType, Weights, random_mask, relative_error
from secateur.bench.results import Environment, _Facts, _Result
from secateur.errors import SecateurError
from secateur.pattern import Pattern
from secateur.progress import Tick, no_tick

TOLERANCE = 2e-2  # of bf16 weights and results
_IN_FP8 = 6e-2  # of inputs in fp8, which alone cost 2 to 3 %
_MOST_BYTES = 8 * 2**30  # of all copies of a weight


class Matrix(Protocol):
    """`secateur.compile.gpu.held.GpuMatrix`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weight on the GPU."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``[tokens, columns]`` to ``[tokens, rows]``."""


HoldEach = Callable[..., Mapping[Any, Matrix | str]]
"""`secateur.compile.gpu.held.hold_each`."""


@dataclass(frozen=True)
class Device:
    """How a device is timed.

    Attributes:
        cache_bytes: of its last cache.
        clock: seconds, once everything that was asked of the device is done.
        record: makes a call that repeats many calls at once.
    """

    device: torch.device
    cache_bytes: int
    clock: Callable[[], float]
    record: Callable[[Callable[[], object]], Callable[[], object]]

    @classmethod
    def cuda(cls, device: torch.device) -> Self:
        """A CUDA device."""

        def clock() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        cache = torch.cuda.get_device_properties(device).L2_cache_size
        return cls(device, cache, clock, _graph)


def _graph(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of what a call does on the device, after two calls that settle everything."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class GpuGroup(_Facts):
    """Kernels that took turns: one shape, value type and number of tokens."""

    rows: int
    columns: int
    tokens: int
    values: ValueType
    kernels: tuple[KernelRow, ...]

    @property
    def title(self) -> str:
        """The group in words."""
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return f"{self.rows} x {self.columns}, {tokens}, {self.values}"


class GpuKernelsResult(_Result):
    """The result of ``bench kernels --device cuda``.

    Attributes:
        command: the command line that made it, if one did.
        settings: peers, threads and the numbers about CPU memory in it have no meaning here.
        cache_bytes: of the GPU's last cache.
    """

    schema_: Literal["secateur/bench-gpu-kernels/1"] = Field(
        "secateur/bench-gpu-kernels/1", alias="schema"
    )
    command: str
    settings: KernelSettings
    cache_bytes: int
    measured_seconds: float
    groups: tuple[GpuGroup, ...]


def measure_gpu_kernels(
    hold_each: HoldEach,
    settings: KernelSettings,
    device: Device,
    *,
    command: str = "",
    progress: Tick = no_tick,
) -> GpuKernelsResult:
    """Time all back ends of all groups; one shape and value type is in memory at a time.

    Raises:
        SecateurError: a back end computes something else than numpy.
    """
    environment = Environment.read(device.device)
    kinds = [kind for kind in settings.values if kind != "fp32"]
    total = len(settings.shapes) * len(kinds) * len(settings.tokens)
    begun = time.perf_counter()
    groups: list[GpuGroup] = []
    for shape in settings.shapes:
        for kind in kinds:
            for group in _groups(hold_each, settings, device, shape, kind):
                groups.append(group)
                progress(len(groups), total)
    return GpuKernelsResult(
        environment=environment,
        dtype="fp16 with fp16 values, else bfloat16",
        notes=("fp32 was left out: the kernels take bf16 and fp16",)
        if "fp32" in settings.values
        else (),
        command=command,
        settings=settings,
        cache_bytes=device.cache_bytes,
        measured_seconds=time.perf_counter() - begun,
        groups=tuple(groups),
    )


class _Dense:
    """cuBLAS on the dense weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.nbytes = weight, weight.nbytes

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, bias)


def _groups(
    hold_each: HoldEach,
    settings: KernelSettings,
    device: Device,
    shape: tuple[int, int],
    kind: ValueType,
) -> Iterator[GpuGroup]:
    """The groups of one shape and value type, which share their weights."""
    draw = np.random.default_rng(settings.seed)
    weights = Weights.draw(kind, *shape, settings.group_size, draw)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    inputs = draw.standard_normal((max(settings.tokens), shape[1]), dtype=np.float32)
    x = torch.from_numpy(inputs).to(device.device, dtype)
    dense = _Dense(torch.from_numpy(weights.dense()).to(device.device, dtype))
    subjects: dict[str, list[Matrix]] = {CONTROL: _copies(dense, device.cache_bytes)}
    rows = {CONTROL: KernelRow(name=CONTROL, kind="control", nbytes=dense.nbytes)}
    for pattern in settings.patterns:
        if (why := pattern.obstacle(*shape)) is not None:
            rows[str(pattern)] = KernelRow(name=str(pattern), kind="sparse", absent=why)
            continue
        for end, matrix, error in _pattern(hold_each, weights, pattern, device, x, settings, draw):
            name = f"{pattern} {end}"
            row = KernelRow(name=name, kind="sparse", layout=end)
            if isinstance(matrix, str):
                rows[name] = row.model_copy(update={"absent": matrix})
                continue
            subjects[name] = _copies(matrix, device.cache_bytes)
            update = {"nbytes": matrix.nbytes, "relative_error": error}
            rows[name] = row.model_copy(update=update)
    for tokens in settings.tokens:
        runners = {
            name: _runner(matrices, x[:tokens], device) for name, matrices in subjects.items()
        }
        samples, calls = time_rounds(
            runners, settings.rounds, settings.min_ms / 1000, settings.seed, device.clock
        )
        reference = {CONTROL: samples[CONTROL]}
        yield GpuGroup(
            rows=shape[0],
            columns=shape[1],
            tokens=tokens,
            values=kind,
            kernels=tuple(
                row.model_copy(update={"copies": len(subjects[name])}).timed(
                    samples[name], calls[name], tokens, math.prod(shape), reference
                )
                if name in samples
                else row
                for name, row in rows.items()
            ),
        )


def _pattern(
    hold_each: HoldEach,
    weights: Weights,
    pattern: Pattern,
    device: Device,
    x: torch.Tensor,
    settings: KernelSettings,
    draw: np.random.Generator,
) -> Iterator[tuple[str, Matrix | str, float]]:
    """A random weight of a pattern for each back end, with the error of its products."""
    blocks = random_mask(pattern, *weights.shape, draw)
    mask = blocks.repeat(pattern.rows, axis=0)
    made = hold_each(
        weights.kept(mask),
        np.packbits(blocks, axis=1, bitorder="little"),
        weights.shape,
        pattern,
        weights.kind,
        scales=weights.scales,
        group_size=weights.group_size,
        device=device.device,
    )
    exact = weights.dense(mask)
    for end, matrix in made.items():
        error = 0.0
        if not isinstance(matrix, str):
            for tokens in settings.tokens:
                found = matrix.multiply(x[:tokens]).float().cpu().numpy()
                truth: Array = x[:tokens].float().cpu().numpy() @ exact.T
                error = max(error, relative_error(found, truth))
        rounds = weights.kind == "fp8" and end not in ("triton", "unpack")
        if error > (_IN_FP8 if rounds else TOLERANCE):
            raise SecateurError(
                f"{end} is wrong: {pattern} {weights.kind}, {weights.shape[0]}x{weights.shape[1]}: "
                f"relative error {error:.2g}",
                "this is a bug: report it with the output of `secateur doctor`",
            )
        yield str(end), matrix, error


def _copies(matrix: Matrix, cache_bytes: int) -> list[Matrix]:
    """The weight so many times that the cache holds none of it when its turn comes."""
    count = copies_of(matrix.nbytes, 2 * cache_bytes, _MOST_BYTES)
    return [matrix, *(copy.deepcopy(matrix) for _ in range(count - 1))]


def _runner(matrices: list[Matrix], x: torch.Tensor, device: Device) -> Runner:
    """One product with each copy as a step."""
    last: list[torch.Tensor] = []

    def call() -> None:
        last[:] = [matrix.multiply(x) for matrix in matrices][-1:]

    recorded = device.record(call)

    def run(steps: int) -> None:
        for _ in range(steps):
            recorded()

    return Runner(run, len(matrices), lambda: np.asarray(last[0].float().cpu().numpy()))
