"""A model behind `secateur serve`, in a process of its own, for as long as it is needed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import EnvironmentFault


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that answers.

    Attributes:
        url: its address, without ``/v1``.
        ready: the line in which it said so: model, engine, layouts, threads.
    """

    url: str
    ready: str


@contextmanager
def served(model: str | Path, arguments: Sequence[str] = ()) -> Iterator[Endpoint]:
    """Serve a directory on a free port of this machine; the server ends with the context.

    Args:
        model: the directory.
        arguments: further arguments of ``secateur serve``.

    Raises:
        EnvironmentFault: it did not start; what it said went to stderr.
    """
    command = [sys.executable, "-m", "secateur", "serve", str(model), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline().strip()
            addresses = [word for word in ready.split() if word.startswith("http://")]
            if not addresses:
                raise EnvironmentFault(
                    f"the endpoint did not start: {ready or 'it ended without a word'}",
                    f"run `secateur serve {model}` to see why",
                )
            yield Endpoint(addresses[0], ready)
        finally:
            process.send_signal(signal.SIGTERM)
