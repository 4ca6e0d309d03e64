"""What ``bench kernels`` is told and what it returns."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, field_validator

from secateur.bench.kernel_peers import PEERS
from secateur.bench.kernel_weights import ValueType
from secateur.bench.results import Estimate, Spread, _Facts, _Result
from secateur.errors import UsageError, did_you_mean
from secateur.pattern import Pattern
from secateur.recipe import Section

# The linear layers of models, [rows, columns] = [outputs, inputs].
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2": ((576, 576), (1536, 576), (576, 1536), (49152, 576)),
    "llama-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
}
CONTROL = "dense"  # the name of our own dense kernel's row
_PATTERNS = ("2:4", "4:16", "50%@16x1", "50%@8x1", "50%@4x1", "75%@16x1", "50%", "80%", "90%")


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Read names of `SHAPES` and ``ROWSxCOLUMNS``; what is named twice counts once.

    Raises:
        UsageError: a text is neither.
    """
    shapes: list[tuple[int, int]] = []
    for text in texts:
        if text in SHAPES:
            shapes += SHAPES[text]
        elif form := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            shapes.append((int(form[1]), int(form[2])))
        else:
            raise UsageError(
                f"the shape {text!r} is not understood",
                f"write ROWSxCOLUMNS, e.g. 4096x4096, or a set: {', '.join(SHAPES)}",
            )
    return list(dict.fromkeys(shapes))


class KernelSettings(Section):
    """What ``bench kernels`` measures, and how.

    Attributes:
        shapes: rows and columns of each weight.
        peers: names of `PEERS`; None: those that suit the value type.
        cache_bytes: copies of a weight fill this much, so that none comes from a cache; None: twice
            the last-level cache and 96 MiB.
        memory_bytes: what all weights of a group may take; None: half of the free memory.
        group_size: columns that share a scale; the block of ONNX Runtime's MatMulNBits.
        spin: let ONNX Runtime's threads wait by spinning while a graph runs.
    """

    shapes: tuple[tuple[int, int], ...] = Field(SHAPES["smollm2"], min_length=1)
    patterns: tuple[Pattern, ...] = Field(tuple(map(Pattern.parse, _PATTERNS)))
    values: tuple[ValueType, ...] = Field(("bf16", "int8", "int4"), min_length=1)
    tokens: tuple[int, ...] = Field((1,), min_length=1)
    threads: tuple[int, ...] = Field((1,), min_length=1)
    peers: tuple[str, ...] | None = None
    rounds: int = Field(5, ge=2)
    min_ms: float = Field(20.0, gt=0)
    roof_mib: int = Field(512, ge=1)
    cache_bytes: int | None = Field(None, ge=0)
    memory_bytes: int | None = Field(None, ge=1)
    group_size: Literal[32, 64, 128] = 64
    seed: int = Field(0, ge=0)
    spin: bool = False

    @field_validator("patterns", "values", "tokens", "threads")
    @classmethod
    def _once(cls, items: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(dict.fromkeys(items))

    @field_validator("tokens", "threads")
    @classmethod
    def _positive(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if min(numbers) < 1:
            raise ValueError("must be 1 or more")
        return numbers

    @field_validator("patterns")
    @classmethod
    def _sparse(cls, patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
        return tuple(pattern for pattern in patterns if not pattern.is_dense)  # the control

    @field_validator("peers")
    @classmethod
    def _known(cls, peers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for peer in peers or ():
            if peer not in PEERS:
                raise ValueError(f"{peer!r} is no peer; {did_you_mean(peer, PEERS)}")
        return None if peers is None else tuple(dict.fromkeys(peers))


class Roof(_Facts):
    """How fast so many threads read memory, GB/s, before and after everything else."""

    threads: int
    before: Spread
    after: Spread

    @property
    def median(self) -> float:
        """Of all its samples: what 100 % is in the table."""
        return statistics.median((*self.before.samples, *self.after.samples))

    @property
    def drift(self) -> float:
        """Median after / median before."""
        return statistics.median(self.after.samples) / statistics.median(self.before.samples)


class KernelRow(_Facts):
    """One kernel in one group; all from `nbytes` on is None if `absent` says why.

    Attributes:
        name: "dense" (our control), a pattern, or a peer.
        kind: our control, our sparse kernel, or a peer.
        layout: of our kernels, as they describe themselves.
        activations: what our kernel multiplied the inputs as, with so many tokens: fp32 or int8.
        why: why a sparse weight is stored dense.
        absent: why there are no numbers.
        nbytes: of one copy of the weight: values, positions, scales, padding.
        bytes_per_weight: nbytes / (rows · columns), removed weights counted too.
        copies: of the weight, taken in turn.
        calls: multiplications in each round.
        relative_error: ‖y - y'‖ / ‖y'‖, y' from numpy; the largest over tokens and threads for our
            kernels. A peer's includes its rounding of weights and inputs, and that of our weights
            to its form.
        us: microseconds of a multiplication, one sample a round.
        median_us: their median, from which the next three are.
        gb_per_s: nbytes / time.
        roof_fraction: gb_per_s / the roof of as many threads.
        gflops: 2 · tokens · rows · columns / time, as if nothing had been removed.
        speedup: by name of the control and of the peers, their time / this one's, paired by round.
    """

    name: str
    kind: Literal["control", "sparse", "peer"]
    layout: str | None = None
    activations: str | None = None
    why: str | None = None
    absent: str | None = None
    nbytes: int | None = None
    bytes_per_weight: float | None = None
    copies: int | None = None
    calls: int | None = None
    relative_error: float | None = None
    us: Spread | None = None
    median_us: float | None = None
    gb_per_s: float | None = None
    roof_fraction: float | None = None
    gflops: float | None = None
    speedup: dict[str, Estimate] = Field({})

    def timed(
        self,
        samples: Sequence[float],
        calls: int,
        tokens: int,
        weights: int,
        references: Mapping[str, Sequence[float]],
    ) -> Self:
        """The row with its numbers.

        Args:
            samples: seconds of a multiplication, one a round.
            calls: multiplications behind each sample.
            tokens: rows of the input.
            weights: rows · columns.
            references: by name the samples of what it is compared with.
        """
        assert self.nbytes is not None
        median = statistics.median(samples)
        return self.model_copy(
            update={
                "calls": calls,
                "bytes_per_weight": self.nbytes / weights,
                "us": Spread.of([1e6 * seconds for seconds in samples]),
                "median_us": 1e6 * median,
                "gb_per_s": self.nbytes / median / 1e9,
                "gflops": 2 * tokens * weights / median / 1e9,
                "speedup": {
                    name: Estimate.of(theirs, samples)
                    for name, theirs in references.items()
                    if name != self.name
                },
            }
        )

    def under(self, roof: Roof) -> Self:
        """The row with its share of the roof."""
        if self.gb_per_s is None:
            return self
        return self.model_copy(update={"roof_fraction": self.gb_per_s / roof.median})


class KernelGroup(_Facts):
    """Kernels that took turns: one shape, value type, number of tokens and of threads."""

    rows: int
    columns: int
    tokens: int
    threads: int
    values: ValueType
    kernels: tuple[KernelRow, ...]

    @property
    def title(self) -> str:
        """The group in words."""
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.rows} x {self.columns}, {tokens}, {threads}, {self.values}"


class KernelsResult(_Result):
    """The result of ``bench kernels``; docs/bench.md explains every key.

    Attributes:
        isa: the instruction set that our kernels use.
        settings: as resolved: nothing in it is None but the peers.
        last_level_cache_bytes: of all caches of the last level; None if the system does not say.
    """

    schema_: Literal["secateur/bench-kernels/1"] = Field("secateur/bench-kernels/1", alias="schema")
    isa: str
    settings: KernelSettings
    last_level_cache_bytes: int | None
    measured_seconds: float
    roofs: tuple[Roof, ...]
    groups: tuple[KernelGroup, ...]
