"""The ``transformers`` engine: any causal LM that transformers can open, on a thread of its own.

One worker owns the model. Running requests take turns: a turn is one piece of a prompt or one
token. Each request has its own KV cache and is computed alone, so its result does not depend on
what else runs.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.checkpoint import Checkpoint
from secateur.device import choose_dtype
from secateur.model import load_causal_lm, load_tokenizer
from secateur.serve import sampling
from secateur.serve.engine import (
    EngineStats,
    Event,
    Generation,
    GenerationFault,
    GenerationRequest,
)
from secateur.serve.linear import kernel_report
from secateur.serve.output import Output
from secateur.serve.sampling import Floats, TokenLogprobs
from secateur.serve.text import TextCodec
from secateur.serve.worker import WorkerEngine, failed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 256  # prompt tokens per turn: others need not wait for a long prompt
DEFAULT_MAX_LENGTH = 2048


def load_transformers(
    directory: Path, *, model_name: str, threads: int | None = None, max_running: int = 16
) -> TransformersEngine:
    """Open a model directory; choices that are not the checkpoint's own go to stderr.

    Raises:
        ModelError: the directory is not a usable model.
    """
    config = Checkpoint(directory).config
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype, reason = choose_dtype("auto", torch.device("cpu"), str(stored))
    if reason:
        print(f"serve: {reason}", file=sys.stderr)
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    codec = TextCodec(load_tokenizer(directory))
    model = load_causal_lm(directory, dtype)
    for use in kernel_report(model):
        print(f"serve: {use}", file=sys.stderr)
    with torch.inference_mode():  # the first run reads the weights from disk: not at a user's cost
        model(input_ids=torch.zeros((1, 1), dtype=torch.long))
    return TransformersEngine(
        model, codec, model_name=model_name, threads=threads, max_running=max_running
    )


class _Sequence:
    """A request being computed."""

    def __init__(self, generation: Generation, output: Output):
        self.generation = generation
        self.request: GenerationRequest = generation.request
        self.output = output
        self.cache: Any = None
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


class TransformersEngine(WorkerEngine):
    """See the module.

    Args:
        model: in evaluation mode; from now on only the worker touches it.
        codec: its tokenizer.
        model_name: the name to serve it under.
        threads: CPU threads of the worker.
        max_running: requests that take turns; more wait. Each has a KV cache of its own.
        max_waiting: requests that wait; more are refused as `EngineBusy`.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        codec: TextCodec,
        *,
        model_name: str,
        threads: int,
        max_running: int = 16,
        max_waiting: int = 256,
    ) -> None:
        super().__init__(max_waiting)
        config = model.config.get_text_config()
        self.model_name = model_name
        self.codec = codec
        self.vocabulary_size = int(config.vocab_size)
        known = getattr(config, "max_position_embeddings", None)
        if known is None:
            print(
                f"serve: config.json names no max_position_embeddings; using {DEFAULT_MAX_LENGTH}",
                file=sys.stderr,
            )
        self.max_length = int(known or DEFAULT_MAX_LENGTH)
        dtype = str(model.dtype).removeprefix("torch.")
        self.description = f"{dtype}, {threads} threads, maximum length {self.max_length}"
        self.end_tokens = _end_tokens(model, codec)
        self._model = model
        self._short_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._threads = threads
        self._max_running = max_running
        self._waiting: deque[_Sequence] = deque()
        self._running: deque[_Sequence] = deque()
        self._start()

    def stats(self) -> EngineStats:
        """How busy the engine is now."""
        with self._changed:
            return EngineStats(len(self._running), self._count_waiting())

    def report(self) -> tuple[str, ...]:
        """What computes the packed linears."""
        return tuple(map(str, kernel_report(self._model)))

    def _queue(self, generation: Generation, output: Output) -> None:
        self._waiting.append(_Sequence(generation, output))

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
        torch.set_num_threads(self._threads)  # also a property of the calling thread
        with torch.inference_mode():
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

    def _advance(self, sequence: _Sequence) -> Event | None:
        """Let the model read the next inputs; an event once the prompt is read."""
        inputs = sequence.next_inputs()
        prompt = sequence.request.prompt
        prefill = sequence.read < len(prompt)
        score = prefill and sequence.output.prompt_logprobs is not None
        options = {} if score or not self._short_logits else {"logits_to_keep": 1}
        answer = self._model(
            input_ids=torch.tensor([inputs], device=self._model.device),
            past_key_values=sequence.cache,
            use_cache=True,
            **options,
        )
        sequence.cache = answer.past_key_values
        logits: torch.Tensor = answer.logits[0].float()
        if score:
            self._score_prompt(sequence, logits)
        if prefill:
            sequence.read += len(inputs)
            if sequence.read < len(prompt):
                return None
        return sequence.step(logits[-1].numpy(force=True)[: self.vocabulary_size])

    def _score_prompt(self, sequence: _Sequence, logits: torch.Tensor) -> None:
        """Note the log-probabilities of the prompt tokens that follow the ones just read."""
        prompt, scored = sequence.request.prompt, sequence.output.prompt_logprobs
        following = prompt[sequence.read + 1 : sequence.read + 1 + len(logits)]
        table = torch.log_softmax(logits[: len(following)], dim=-1)
        count = min(sequence.request.prompt_logprobs or 0, table.shape[-1])
        best = torch.topk(table, count, dim=-1)
        tops, ids = best.values.tolist(), best.indices.tolist()
        assert scored is not None
        for row, token in enumerate(following):
            top = tuple(zip(ids[row], tops[row], strict=True))
            scored.append(TokenLogprobs(token, float(table[row, token]), top))


def _end_tokens(model: PreTrainedModel, codec: TextCodec) -> frozenset[int]:
    """The tokens after which the model itself says that the text is over."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = codec.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])
