"""What the model and the sampler are asked in one step, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.serve.engine import Generation, GenerationRequest
from secateur.serve.native import sampling
from secateur.serve.native.scheduler import Plan, Sequence
from secateur.serve.native.step import Batch, Floats
from secateur.serve.output import Output
from secateur.serve.sampling import GREEDY_BELOW, TokenLogprobs


class Run(Sequence):
    """A request on its way: what of it outlives a step, and being sent back to wait."""

    def __init__(self, generation: Generation, output: Output) -> None:
        request = generation.request
        super().__init__(
            request.prompt,
            client=request.client,
            submitted=generation.submitted,
            reuse=request.prompt_logprobs is None,
        )
        self.generation = generation
        self.request: GenerationRequest = request
        self.output = output
        self.sampler = sampling.make_sampler(request.sampling, request.prompt)
        self._greedy = request.sampling.temperature < GREEDY_BELOW
        self._random = np.random.default_rng(request.sampling.seed)

    @property
    def cancelled(self) -> bool:
        """Nobody listens any more."""
        return self.generation.cancelled

    def uniform(self) -> float:
        """The random number of the next choice."""
        return 0.0 if self._greedy else self._random.random()

    def scored(self, count: int) -> range:
        """Which of the next ``count`` tokens say how likely the one after them in the prompt is."""
        scores = self.output.prompt_logprobs
        if scores is None:
            return range(0)
        return range(
            max(0, len(scores) - 1 - self.computed),  # sent back to wait: some are known
            min(count, len(self.request.prompt) - 1 - self.computed),
        )


@dataclass(slots=True)
class Questions:
    """Which logits of a plan are wanted, and what for.

    Attributes:
        wanted: of which tokens of the plan, all in a row.
        choices: run and row of the logits from which its next token is chosen.
        scores: run, row and the token of the prompt whose log-probability is asked for.
    """

    wanted: list[int] = field(default_factory=list)
    choices: list[tuple[Run, int]] = field(default_factory=list)
    scores: list[tuple[Run, int, int]] = field(default_factory=list)


def make_questions(plan: Plan[Run]) -> Questions:
    """What has to be known after a plan is computed."""
    questions, start = Questions(), 0
    for run, count in plan:
        for at in run.scored(count):
            following = run.tokens[run.computed + at + 1]
            questions.scores.append((run, len(questions.wanted), following))
            questions.wanted.append(start + at)
        if run.remaining == count and run.output.room:
            questions.choices.append((run, len(questions.wanted)))
            questions.wanted.append(start + count - 1)
        start += count
    return questions


def make_batch(plan: Plan[Run], wanted: list[int]) -> Batch:
    """What the model has to know of a plan."""
    tokens: list[int] = []
    starts = [0]
    for run, count in plan:
        tokens += run.tokens[run.computed : run.computed + count]
        starts.append(len(tokens))
    tables = np.zeros((len(plan), max(len(run.pages) for run, _ in plan)), dtype=np.int32)
    for row, (run, _) in zip(tables, plan, strict=True):
        row[: len(run.pages)] = run.pages
    return Batch(
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.array(starts, dtype=np.int32),
        positions=np.array([run.computed for run, _ in plan], dtype=np.int32),
        tables=tables,
        wanted=np.array(wanted, dtype=np.int32),
    )


def answer(
    questions: Questions, logits: Floats
) -> tuple[list[tuple[int, TokenLogprobs | None]], list[TokenLogprobs]]:
    """Choose tokens and look log-probabilities up, each in one call.

    Args:
        questions: what is asked.
        logits: float32 ``[wanted, vocabulary]``.

    Returns:
        For each choice the token (or `sampling.REFUSED`) and its log-probabilities if asked for;
        for each score the log-probabilities.
    """
    runs = [run for run, _ in questions.choices]
    rows = [row for _, row in questions.choices]
    tokens = _choose(runs, rows, logits)
    wanting = [
        run.request.logprobs is not None and token != sampling.REFUSED
        for run, token in zip(runs, tokens, strict=True)
    ]
    asked = [(row, token, run.request.prompt_logprobs or 0) for run, row, token in questions.scores]
    asked += [
        (row, token, run.request.logprobs or 0)
        for run, row, token, wants in zip(runs, rows, tokens, wanting, strict=True)
        if wants
    ]
    found = sampling.logprobs(logits, asked)
    scores, details = found[: len(questions.scores)], iter(found[len(questions.scores) :])
    choices = [
        (token, next(details) if wants else None)
        for token, wants in zip(tokens, wanting, strict=True)
    ]
    return choices, scores


def _choose(runs: list[Run], rows: list[int], logits: Floats) -> list[int]:
    """Sample a token for each run; log-probabilities are read from ``logits``: these stay."""
    if any(run.request.constraint is not None for run in runs):
        logits, rows = logits[rows], list(range(len(rows)))
        for row, run in zip(logits, runs, strict=True):
            if run.request.constraint is not None:
                row[~_allowed(run, len(row))] = -np.inf
    return sampling.sample(
        [run.sampler for run in runs], logits, rows, [run.uniform() for run in runs]
    )


def _allowed(run: Run, vocabulary_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens may come next; none, so that the run fails alone, if its grammar fails."""
    try:
        mask = run.output.allowed()
    except ValueError:
        return np.zeros(vocabulary_size, dtype=np.bool_)
    assert mask is not None
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocabulary_size)
    return bits.view(np.bool_)
