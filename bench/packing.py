"""How fast weights come into the layouts of GPUs and back, beside torch's own conversion.

A weight is a random 2:4 one. In each round every conversion runs once, in a new random order, for
at least so many milliseconds; ratios to torch are of times of the same round. The layouts are
handed in (`Layout`), since this stage does not import the one they are in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from secateur.bench.kernel_group import Kernels
from secateur.bench.kernel_rounds import Runner, time_rounds
from secateur.bench.kernel_weights import Array, Weights, random_mask
from secateur.bench.kernels import kernel_environment, threads_restored
from secateur.bench.results import Estimate, Spread, _Facts, _Result
from secateur.bench.subjects import notes_on_machine
from secateur.errors import SecateurError
from secateur.pattern import Pattern
from secateur.recipe import Section

PackedType = Literal["bf16", "fp16", "int8"]
Way = Literal["from dense", "from packed", "to dense"]
TORCH = "torch"


class Packed(Protocol):
    """A weight in a layout."""

    def to_dense(self) -> Array:
        """The bits of the weight."""

    def to_pieces(self, value_type: Any, scales: Any = None, group_size: int | None = None) -> Any:
        """The weight as a packed model has it."""


class Layout(Protocol):
    """The module ``sm80`` or ``sm90`` of `secateur.compile.gpu`."""

    def from_dense(self, weight: Array) -> Packed:
        """Bring a weight into this layout."""

    def from_pieces(self, pieces: Any) -> Packed:
        """Bring a weight of a packed model into this layout."""


class PackingSettings(Section):
    """What ``bench packing`` measures, and how.

    Attributes:
        rows, columns: of the weight, multiples of 32 and of 128: what all layouts take.
        min_ms: milliseconds of each conversion in a round, at least.
    """

    rows: int = Field(2048, ge=32, multiple_of=32)
    columns: int = Field(2048, ge=128, multiple_of=128)
    values: tuple[PackedType, ...] = Field(("bf16", "int8"), min_length=1)
    threads: int = Field(1, ge=1)
    rounds: int = Field(5, ge=2)
    min_ms: float = Field(20.0, gt=0)
    seed: int = Field(0, ge=0)


class PackingRow(_Facts):
    """One conversion of one value type.

    Attributes:
        name: the layout, or "torch".
        gb_per_s: bytes of the dense weight / time, one sample a round.
        speedup: torch's time / this one's, paired by round; None for torch, and for ways that torch
            does not have.
    """

    values: PackedType
    name: str
    way: Way
    gb_per_s: Spread
    median_gb_per_s: float
    speedup: Estimate | None


class PackingResult(_Result):
    """The result of ``bench packing``; docs/bench.md explains every key.

    Attributes:
        isa: the instruction set that our kernels use.
    """

    schema_: Literal["secateur/bench-packing/1"] = Field("secateur/bench-packing/1", alias="schema")
    isa: str
    settings: PackingSettings
    conversions: tuple[PackingRow, ...]


def measure_packing(
    layouts: Mapping[str, Layout],
    kernels: Kernels,
    settings: PackingSettings,
    *,
    command: str = "",
) -> PackingResult:
    """Time the conversions of each value type, taking turns.

    Args:
        layouts: by name.
        kernels: the module `secateur.compile.cpu`.
        command: kept in the result.

    Raises:
        SecateurError: a layout gave back another weight than it took.
    """
    import torch

    rows: list[PackingRow] = []
    with threads_restored(kernels):
        kernels.set_threads(settings.threads)
        torch.set_num_threads(settings.threads)
        environment = kernel_environment()
        for values in settings.values:
            weight = _weight(values, settings)
            calls = _conversions(layouts, weight, values)
            runners = {f"{name}|{way}": _runner(call) for (name, way), call in calls.items()}
            samples, _ = time_rounds(
                runners, settings.rounds, settings.min_ms / 1000, settings.seed
            )
            for name, way in calls:
                seconds = samples[f"{name}|{way}"]
                theirs = samples.get(f"{TORCH}|{way}")
                speeds = [weight.nbytes / second / 1e9 for second in seconds]
                rows.append(
                    PackingRow(
                        values=values,
                        name=name,
                        way=way,
                        gb_per_s=Spread.of(speeds),
                        median_gb_per_s=statistics.median(speeds),
                        speedup=Estimate.of(theirs, seconds) if theirs and name != TORCH else None,
                    )
                )
    return PackingResult(
        environment=environment,
        dtype="integers",
        notes=notes_on_machine(environment),
        command=command,
        isa=kernels.isa(),
        settings=settings,
        conversions=tuple(rows),
    )


def _weight(values: PackedType, settings: PackingSettings) -> Array:
    """The bits of a dense weight, zeros in place."""
    draw = np.random.default_rng(settings.seed)
    shape = settings.rows, settings.columns
    weight = Weights.draw(values, *shape, 128, draw).stored
    weight[weight == 0] = 1  # what is kept is not zero, so that torch sees the same mask
    weight[~random_mask(Pattern.parse("2:4"), *shape, draw)] = 0
    return weight


def _conversions(
    layouts: Mapping[str, Layout], weight: Array, values: PackedType
) -> dict[tuple[str, Way], Callable[[], object]]:
    """What is timed, by name and way; each layout first gives back what it took."""
    import torch
    from torch.sparse import _semi_structured_conversions

    theirs: Any = _semi_structured_conversions  # untyped
    scales = group = None
    if values == "int8":
        scales, group = np.ones((len(weight), weight.shape[1] // 128), np.float16), 128
    calls: dict[tuple[str, Way], Callable[[], object]] = {}
    for name, layout in layouts.items():
        packed = layout.from_dense(weight)
        pieces = packed.to_pieces(values, scales, group)
        for form in (packed, layout.from_pieces(pieces)):
            if not np.array_equal(form.to_dense().view(weight.dtype), weight):
                raise SecateurError(f"the layout {name} changes a weight of {values}")
        calls[name, "from dense"] = partial(layout.from_dense, weight)
        calls[name, "from packed"] = partial(layout.from_pieces, pieces)
        calls[name, "to dense"] = packed.to_dense
    carried = torch.from_numpy(weight.view(np.int8 if values == "int8" else np.int16))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[values]
    dense = carried.view(dtype)
    parts = theirs.sparse_semi_structured_from_dense_cutlass(dense)
    calls[TORCH, "from dense"] = partial(theirs.sparse_semi_structured_from_dense_cutlass, dense)
    calls[TORCH, "to dense"] = partial(theirs.sparse_semi_structured_to_dense_cutlass, *parts)
    return calls


def _runner(call: Callable[[], object]) -> Runner:
    def run(steps: int) -> None:
        for _ in range(steps):
            call()

    return Runner(run, 1, lambda: np.empty(0))
