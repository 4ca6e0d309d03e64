"""What engines share whose model belongs to one thread: queueing, refusing, draining, ending."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections import deque

from secateur.serve.engine import (
    Engine,
    EngineBusy,
    EngineUnavailable,
    Event,
    Generation,
    GenerationFault,
    GenerationRequest,
    check_request,
)
from secateur.serve.output import Output

LONGEST_RETRY = 60.0  # seconds


class WorkerEngine(Engine):
    """An engine with one worker; `_start` it when all else is ready.

    Args:
        max_waiting: requests that wait; more are refused as `EngineBusy`.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._ended: deque[float] = deque(maxlen=32)  # when requests ended lately
        self._changed = threading.Condition()  # guards what waits and runs
        self._refusing: str | None = None
        self._end = float("inf")
        self._worker = threading.Thread(target=self._work, name="secateur-engine", daemon=True)

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request; see `Engine.submit`."""
        check_request(request, self)
        generation = Generation(request)
        output = Output(request, self.codec, self.end_tokens, self.max_length)
        with self._changed:
            if self._refusing is not None:
                raise EngineUnavailable(self._refusing)
            waiting = self._count_waiting()
            if waiting >= self._max_waiting:
                raise EngineBusy(f"{waiting} requests wait already", self._retry_after(waiting))
            self._queue(generation, output)
            self._changed.notify()
        return generation

    def unavailable(self) -> str | None:
        """Why the engine takes no requests, or None."""
        return self._refusing

    def drain(self, seconds: float) -> None:
        """Take no more requests; see `Engine.drain`."""
        # No lock: this is called by signal handlers, which may interrupt a thread that holds it.
        self._refusing = self._refusing or "the server is shutting down"
        self._end = min(self._end, time.monotonic() + seconds)

    def close(self) -> None:
        """Abort everything, end the worker and free the model."""
        self.drain(0.0)
        with self._changed:
            self._changed.notify()
        self._worker.join()

    @abstractmethod
    def _serve(self) -> None:
        """The worker's life: compute until `_end` has come, then abort what is left."""

    @abstractmethod
    def _queue(self, generation: Generation, output: Output) -> None:
        """Let a request wait for its turn."""

    @abstractmethod
    def _count_waiting(self) -> int:
        """How many wait; of those whose sender has gone none."""

    @abstractmethod
    def _clear(self, last: Event | GenerationFault) -> None:
        """End all requests with the same event."""

    def _start(self) -> None:
        self._worker.start()

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as fault:
            self._refusing = f"the engine's worker died: {type(fault).__name__}: {fault}"
            print(f"serve: {self._refusing}", file=sys.stderr)
            traceback.print_exception(fault)
            self._clear(GenerationFault(self._refusing))

    def _retry_after(self, waiting: int) -> float:
        """Seconds until those who wait now should have their turn, from the latest throughput."""
        if len(self._ended) < 2:
            return 1.0
        seconds = (time.monotonic() - self._ended[0]) / len(self._ended)
        return min(max(1.0, seconds * waiting), LONGEST_RETRY)


def failed(fault: Exception) -> GenerationFault:
    """What the sender of a request hears that could not be computed; the log has the rest."""
    print("serve: a request failed:", file=sys.stderr)
    traceback.print_exception(fault)
    return GenerationFault(f"{type(fault).__name__}: {fault}")
