"""One weight shape in one value type: our kernels and their peers made, checked and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any, Protocol, Self

import numpy as np

from secateur.bench.kernel_peers import PEERS, PEERS_OF, make_peer, peer_bytes
from secateur.bench.kernel_results import CONTROL, KernelGroup, KernelRow, KernelSettings
from secateur.bench.kernel_rounds import Runner, Subject, rotation, time_rounds
from secateur.bench.kernel_weights import Array, ValueType, Weights, random_mask, relative_error
from secateur.errors import SecateurError, UsageError
from secateur.pattern import Pattern

TOLERANCE = {"fp32": 1e-4, "int8": 2e-2}  # by activations
_MOST_COPIES = 4096
_WORK = 24  # bytes a weight while masks are drawn, weights packed and results checked
_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5, "fp8": 2.0}


class Matrix(Protocol):
    """A weight in a CPU layout: `secateur.compile.cpu.CpuMatrix`."""

    @property
    def rows(self) -> int:
        """Outputs."""

    @property
    def layout(self) -> str:
        """How it lies in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of everything that a multiplication reads of it."""

    @property
    def why(self) -> str | None:
        """Why a sparse weight is stored dense."""

    def matmul(self, x: Any, bias: Any = None, out: Any = None) -> Any:
        """Multiply float32 ``[tokens, columns]``."""

    def rounds_inputs(self, tokens: int) -> bool:
        """Whether a product with so many tokens rounds them to int8."""

    def clone(self) -> Self:
        """The same in other memory."""


class Kernels(Protocol):
    """The module `secateur.compile.cpu`."""

    def pack(
        self,
        values: Any,
        bitmask: Any,
        shape: tuple[int, int],
        pattern: Any,
        value_type: Any,
        *,
        scales: Any = None,
        group_size: int | None = None,
    ) -> Matrix:
        """A weight in the layout that suits it."""

    def set_threads(self, count: int, pin: bool = False) -> None:
        """How many threads multiply."""

    def threads(self) -> int:
        """How many threads multiply."""

    def isa(self) -> str:
        """The instruction set in use."""

    def read_bandwidth(self, nbytes: int, rounds: int) -> Sequence[float]:
        """GB/s of reading a buffer, one for each round."""


def copies_of(nbytes: int, cache_bytes: int, extra_bytes: int) -> int:
    """How many copies of a weight there are: as many as fill the cache, two at least.

    Args:
        nbytes: of one copy.
        cache_bytes: what the copies are to fill.
        extra_bytes: what those beyond the second may take.
    """
    wanted = max(2, -(-cache_bytes // nbytes))
    return min(wanted, 2 + max(0, extra_bytes) // nbytes, _MOST_COPIES)


@dataclass(frozen=True)
class Plan:
    """The memory of one shape and value type.

    Attributes:
        peers: what is compared with.
        extra_bytes: what each subject may take beyond two copies of its weight.
    """

    peers: tuple[str, ...]
    extra_bytes: int

    @classmethod
    def of(cls, settings: KernelSettings, shape: tuple[int, int], kind: ValueType) -> Self:
        """Share out the memory, two copies of everything first.

        Raises:
            UsageError: not even those fit.
        """
        assert settings.memory_bytes is not None
        rows, columns = shape
        peers = PEERS_OF[kind] if settings.peers is None else settings.peers
        own = 1.2 * _BYTES[kind] * rows * columns  # with scales and padding
        own *= 1 + len(settings.patterns)
        theirs = sum(peer_bytes(peer, *shape, settings.group_size) for peer in peers)
        most = max(settings.tokens) * (rows * (len(peers) + 4) + columns) * 4
        least = int(2 * (own + theirs) + _WORK * rows * columns + most)
        if least > settings.memory_bytes:
            raise UsageError(
                f"{rows}x{columns} in {kind} takes at least {least / 2**30:.1f} GiB, and "
                f"{settings.memory_bytes / 2**30:.1f} GiB are allowed",
                "name fewer patterns, peers or tokens, or raise --memory",
            )
        subjects = 1 + len(settings.patterns) + len(peers)
        return cls(peers, (settings.memory_bytes - least) // subjects)


def _activations(matrix: Matrix, tokens: int) -> str:
    return "int8" if matrix.rounds_inputs(tokens) else "fp32"


@dataclass
class OwnSubject:
    """One of our matrices with its copies."""

    matrices: list[Matrix]

    def __post_init__(self) -> None:
        self.nbytes, self.copies = self.matrices[0].nbytes, len(self.matrices)

    def bind(self, x: Array) -> Runner:
        """Make ready to multiply."""
        out = np.empty((len(x), self.matrices[0].rows), dtype=np.float32)
        calls = cycle([partial(matrix.matmul, x, None, out) for matrix in self.matrices])
        return Runner(rotation(calls), 1, lambda: out)


@dataclass
class ShapeBench:
    """One shape and value type: its weights, and the groups that share them."""

    kernels: Kernels
    settings: KernelSettings
    shape: tuple[int, int]
    kind: ValueType
    notes: list[str]
    rows: dict[str, KernelRow] = field(default_factory=dict)
    own: dict[str, OwnSubject] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan = Plan.of(self.settings, self.shape, self.kind)
        self.draw = np.random.default_rng(self.settings.seed)
        self.weights = Weights.draw(self.kind, *self.shape, self.settings.group_size, self.draw)
        tokens = max(self.settings.tokens)
        self.x = self.draw.standard_normal((tokens, self.shape[1]), dtype=np.float32)

    def groups(self) -> Iterator[KernelGroup]:
        """Measure one group after the other."""
        for pattern in (Pattern(), *self.settings.patterns):
            self._pack(pattern)
        truth = self.x @ self.weights.dense().T
        in_torch = [name for name in self.plan.peers if name.startswith("torch-")]
        others = [name for name in self.plan.peers if name not in in_torch]
        subjects = self.own | self._peers(in_torch, 1)
        for threads in self.settings.threads:
            yield from self._of_threads(subjects, others, threads, truth)

    def _of_threads(
        self, subjects: dict[str, Subject], others: list[str], threads: int, truth: Array
    ) -> Iterator[KernelGroup]:
        """The groups of one number of threads, for which ONNX Runtime's graphs are made anew."""
        import torch

        subjects = subjects | self._peers(others, threads)
        self.kernels.set_threads(threads)
        torch.set_num_threads(threads)
        for tokens in self.settings.tokens:
            yield self._group(subjects, threads, tokens, truth[:tokens])

    def _pack(self, pattern: Pattern) -> None:
        """Pack a random weight of a pattern, check what it computes, and copy it."""
        name = CONTROL if pattern.is_dense else str(pattern)
        row = KernelRow(name=name, kind="control" if pattern.is_dense else "sparse")
        if (obstacle := pattern.obstacle(*self.shape)) is not None:
            self.rows[name] = row.model_copy(update={"absent": obstacle})
            return
        mask = bits = None
        if not pattern.is_dense:
            blocks = random_mask(pattern, *self.shape, self.draw)
            bits = np.packbits(blocks, axis=1, bitorder="little")
            mask = blocks.repeat(pattern.rows, axis=0)
        matrix = self.kernels.pack(
            self.weights.kept(mask),
            bits,
            self.shape,
            pattern,
            self.kind,
            scales=self.weights.scales,
            group_size=self.weights.group_size,
        )
        copies = self._copies(name, matrix.nbytes)
        subject = OwnSubject([matrix, *(matrix.clone() for _ in range(copies - 1))])
        self.own[name] = subject
        self.rows[name] = row.model_copy(
            update={
                "layout": matrix.layout,
                "why": matrix.why,
                "nbytes": matrix.nbytes,
                "copies": copies,
                "relative_error": self._error(name, subject.matrices[-1], mask),
            }
        )

    def _error(self, name: str, matrix: Matrix, mask: Array | None) -> float:
        """The largest error of a matrix over numbers of tokens and threads.

        Raises:
            SecateurError: it is larger than rounding explains.
        """
        truth = self.x @ self.weights.dense(mask).T
        worst = 0.0
        for threads in self.settings.threads:
            self.kernels.set_threads(threads)
            for tokens in self.settings.tokens:
                result = np.full((tokens, self.shape[0]), np.nan, dtype=np.float32)
                matrix.matmul(self.x[:tokens], None, result)
                error = relative_error(result, truth[:tokens])
                if error > TOLERANCE[_activations(matrix, tokens)]:
                    raise SecateurError(
                        f"the kernel of {name} {self.kind} (layout {matrix.layout}, "
                        f"{self.kernels.isa()}) is wrong: {self.shape[0]}x{self.shape[1]}, "
                        f"{tokens} tokens, {threads} threads: relative error {error:.2g}",
                        "this is a bug: report it with the output of `secateur doctor`",
                    )
                worst = max(worst, error)
        return worst

    def _copies(self, name: str, nbytes: int) -> int:
        assert self.settings.cache_bytes is not None
        copies = copies_of(nbytes, self.settings.cache_bytes, self.plan.extra_bytes)
        if copies * nbytes < self.settings.cache_bytes:
            rows, columns = self.shape
            self.notes.append(
                f"{rows}x{columns} {self.kind} {name}: {copies} copies of {nbytes} bytes do not "
                "fill --cache-mib: caches may have helped"
            )
        return copies

    def _peers(self, names: Sequence[str], threads: int) -> dict[str, Subject]:
        """Make the peers that there are; the rows say why the others are absent."""
        made: dict[str, Subject] = {}
        for name in names:
            row = KernelRow(name=name, kind="peer")
            copies = self._copies(name, peer_bytes(name, *self.shape, self.settings.group_size))
            try:
                made[name] = peer = make_peer(
                    name,
                    self.weights,
                    self.settings.group_size,
                    copies,
                    threads,
                    self.settings.spin,
                )
                self.rows[name] = row.model_copy(
                    update={"nbytes": peer.nbytes, "copies": peer.copies}
                )
            except ImportError as fault:
                absent = f"not installed: {fault.name or fault} (pip install 'secateur[peers]')"
                self.rows[name] = row.model_copy(update={"absent": absent})
            except Exception as fault:  # another program's fault must not end our measurement
                absent = f"failed: {str(fault).splitlines()[0] if str(fault) else repr(fault)}"
                self.rows[name] = row.model_copy(update={"absent": absent})
        return made

    def _group(
        self, subjects: dict[str, Subject], threads: int, tokens: int, truth: Array
    ) -> KernelGroup:
        runners = {name: subject.bind(self.x[:tokens]) for name, subject in subjects.items()}
        samples, calls = time_rounds(
            runners, self.settings.rounds, self.settings.min_ms / 1000, self.settings.seed
        )
        references = {name: samples[name] for name in (CONTROL, *PEERS) if name in samples}
        weights = math.prod(self.shape)
        rows = []
        for name, row in self.rows.items():
            if name in runners:
                row = row.timed(samples[name], calls[name], tokens, weights, references)
                if name in self.own:
                    matrix = self.own[name].matrices[0]
                    row = row.model_copy(update={"activations": _activations(matrix, tokens)})
                if row.kind == "peer":
                    error = relative_error(runners[name].result(), truth)
                    row = row.model_copy(
                        update={"relative_error": error if math.isfinite(error) else None}
                    )
            rows.append(row)
        return KernelGroup(
            rows=self.shape[0],
            columns=self.shape[1],
            tokens=tokens,
            threads=threads,
            values=self.kind,
            kernels=tuple(rows),
        )
