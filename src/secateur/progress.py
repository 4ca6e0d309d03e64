"""Progress of long work on stderr: a bar with ETA on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from secateur.interrupt import noted_interrupts

# Called with (done, total) as work proceeds.
Tick = Callable[[int, int], None]


def no_tick(done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Tick]:
    """Show the progress of one piece of work while the context lasts.

    Each call of the tick is also where a lost Ctrl-C takes effect.
    """
    with ExitStack() as stack:
        check = stack.enter_context(noted_interrupts())
        if quiet:
            show: Tick = no_tick
        elif sys.stderr.isatty():
            show = stack.enter_context(_bar(title))
        else:
            show = _Lines(title)

        def tick(done: int, total: int) -> None:
            check()
            show(done, total)

        yield tick


@contextmanager
def _bar(title: str) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Plain lines, for logs."""

    def __init__(self, title: str, every: float = 10.0) -> None:
        self.title = title
        self.every = every
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < self.every and done < total:
            return
        self.last = now
        spent = now - self.start
        left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{self.title}: {done}/{total} ({spent:.0f} s{left})", file=sys.stderr, flush=True)
