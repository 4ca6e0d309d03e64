"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever it happens to be, and drops it inside a destructor: in work
that frees tensors all the time that is often enough. So it is noted, too, and long work asks at
each of its steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


@contextmanager
def noted_interrupts() -> Iterator[Callable[[], None]]:
    """While the context lasts, note SIGINT besides raising KeyboardInterrupt.

    Yields a function that raises the KeyboardInterrupt that was noted and lost. Where somebody else
    handles SIGINT, and outside the main thread, nothing is changed.
    """
    came = False

    def note(*_: Any) -> NoReturn:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    free = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not free or threading.current_thread() is not threading.main_thread():
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()
