"""Taking turns: kernels bound to their inputs, timed in rounds of random order."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from secateur.bench.kernel_weights import Array


@dataclass(frozen=True)
class Runner:
    """A kernel bound to its input and output.

    Attributes:
        run: take this many steps; each multiplies `calls` times, with other copies each time.
        calls: multiplications in one step.
        result: float32 ``[tokens, rows]``, what the last step wrote.
    """

    run: Callable[[int], object]
    calls: int
    result: Callable[[], Array]


class Subject(Protocol):
    """A weight as one kernel wants it, several times."""

    nbytes: int
    copies: int

    def bind(self, x: Array) -> Runner:
        """Make ready to multiply float32 ``[tokens, columns]``."""


def rotation(calls: Iterator[Callable[[], object]]) -> Callable[[int], None]:
    """Make so many of an endless row of calls, going on each time where it stopped."""

    def run(steps: int) -> None:
        for call in islice(calls, steps):
            call()

    return run


def time_rounds(
    runners: dict[str, Runner],
    rounds: int,
    min_seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Run everything once in each round, in a new order each time.

    Returns:
        By name the seconds of a multiplication, one for each round; and how many multiplications
        each of these is the mean of.
    """
    steps = {name: steps_for(runner, min_seconds, clock) for name, runner in runners.items()}
    calls = {name: steps[name] * runner.calls for name, runner in runners.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            begun = clock()
            runners[name].run(steps[name])
            samples[name].append((clock() - begun) / calls[name])
    return samples, calls


def steps_for(runner: Runner, min_seconds: float, clock: Callable[[], float]) -> int:
    """How many steps take so long; finding out warms up."""
    runner.run(1)
    steps = 1
    while True:
        begun = clock()
        runner.run(steps)
        elapsed = clock() - begun
        if elapsed >= min_seconds:
            return steps
        by_time = math.ceil(1.2 * steps * min_seconds / elapsed) if elapsed > 0 else 10 * steps
        steps = min(max(steps + 1, by_time), 10 * steps)
