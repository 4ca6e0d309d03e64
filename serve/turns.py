"""Engines whose running requests take turns: a piece of a prompt, or one token, at a time.

Each request has its own KV cache and is computed alone, so its result does not depend on what else
runs.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from typing import Any

import numpy as np

from secateur.serve import sampling
from secateur.serve.engine import (
    EngineStats,
    Event,
    Generation,
    GenerationFault,
    GenerationRequest,
)
from secateur.serve.output import Output
from secateur.serve.sampling import Floats
from secateur.serve.worker import WorkerEngine, failed

PREFILL_CHUNK = 256  # prompt tokens per turn: others need not wait for a long prompt


class Sequence:
    """A request being computed."""

    def __init__(self, generation: Generation, output: Output):
        self.generation = generation
        self.request: GenerationRequest = generation.request
        self.output = output
        self.cache: Any = None  # the engine's own
        self.read = 0  # prompt tokens in the cache
        self.random = np.random.default_rng(self.request.sampling.seed)

    def next_inputs(self) -> tuple[int, ...]:
        """The tokens that the model has to read in this turn."""
        if self.read < len(self.request.prompt):
            return self.request.prompt[self.read : self.read + PREFILL_CHUNK]
        return (self.output.tokens[-1],)

    def step(self, logits: Floats) -> Event:
        """Choose a token from the logits (vocabulary,) and say what follows from it."""
        if self.output.room == 0:
            return self.output.nothing()
        request, before = self.request, self.output.tokens
        allowed = self.output.allowed()
        token = sampling.sample(
            logits, request.sampling, request.prompt, before, self.random, allowed
        )
        details = None
        if request.logprobs is not None:
            details = sampling.logprobs(logits, token, request.logprobs)
        return self.output.add(token, details)


class TurnsEngine(WorkerEngine):
    """See the module; an engine adds the model, in `_logits`.

    Args:
        max_running: requests that take turns; more wait. Each has a KV cache of its own.
        max_waiting: requests that wait; more are refused as `EngineBusy`.
    """

    def __init__(self, max_running: int = 16, max_waiting: int = 256) -> None:
        super().__init__(max_waiting)
        self._max_running = max_running
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()

    @abstractmethod
    def _logits(self, sequence: Sequence, inputs: tuple[int, ...], every: bool) -> Floats:
        """Let the model read tokens, which go to ``sequence.cache``.

        Returns:
            ``[positions, vocabulary]``: of every token, or at least of the last.
        """

    def stats(self) -> EngineStats:
        """How busy the engine is now."""
        with self._changed:
            return EngineStats(len(self._running), self._count_waiting())

    def _queue(self, generation: Generation, output: Output) -> None:
        self._waiting.append(Sequence(generation, output))

    def _count_waiting(self) -> int:
        return sum(not sequence.generation.cancelled for sequence in self._waiting)

    def _clear(self, last: Event | GenerationFault) -> None:
        with self._changed:
            Generation.deliver_all(
                [(one.generation, last) for one in (*self._waiting, *self._running)]
            )
            self._waiting.clear()
            self._running.clear()

    def _serve(self) -> None:
        while self._admit():
            self._turn()

    def _admit(self) -> bool:
        """Wait for something to do; False when the engine is to end."""
        with self._changed:
            while not self._waiting and not self._running:
                if time.monotonic() >= self._end:
                    return False
                self._changed.wait()
            if time.monotonic() >= self._end:
                self._clear(Event(None, finish_reason="abort"))
                return True
            while self._waiting and len(self._running) < self._max_running:
                sequence = self._waiting.popleft()
                if not sequence.generation.cancelled:
                    self._running.append(sequence)
        return True

    def _turn(self) -> None:
        """One piece of work for the request whose turn it is."""
        if not self._running:
            return
        sequence = self._running[0]
        generation = sequence.generation
        outcome: Event | GenerationFault | None = None
        ended = generation.cancelled
        if not ended:
            if generation.started is None:
                generation.started = time.monotonic()
            try:
                outcome = self._advance(sequence)
                ended = outcome is not None and outcome.finish_reason is not None
            except Exception as fault:  # whatever it was, it concerns this request only
                outcome, ended = failed(fault), True
        with self._changed:
            self._running.popleft()
            if ended:
                self._ended.append(time.monotonic())
            else:
                self._running.append(sequence)
        if outcome is not None:  # only now: who reads it may look at stats()
            generation.deliver(outcome)

    def _advance(self, sequence: Sequence) -> Event | None:
        """Let the model read the next inputs; an event once the prompt is read."""
        inputs = sequence.next_inputs()
        prompt = sequence.request.prompt
        prefill = sequence.read < len(prompt)
        score = prefill and sequence.output.prompt_logprobs is not None
        logits = self._logits(sequence, inputs, score)
        if score:
            _score_prompt(sequence, logits)
        if prefill:
            sequence.read += len(inputs)
            if sequence.read < len(prompt):
                return None
        return sequence.step(logits[-1][: self.vocabulary_size])


def _score_prompt(sequence: Sequence, logits: Floats) -> None:
    """Note the log-probabilities of the prompt tokens that follow the ones just read."""
    prompt, scored = sequence.request.prompt, sequence.output.prompt_logprobs
    count = min(sequence.request.prompt_logprobs or 0, logits.shape[-1])
    assert scored is not None
    following = prompt[sequence.read + 1 : sequence.read + 1 + len(logits)]
    for row, token in zip(logits, following, strict=False):
        scored.append(sampling.logprobs(row, token, count))
