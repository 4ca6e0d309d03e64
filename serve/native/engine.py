"""The native engine: one worker that owns the model and computes for all requests at once.

Each step is one call of the model for a batch that the scheduler chose, and one call of the
sampler. A request has its random numbers, its penalties and its text for itself, so what it
generates does not depend on what else is in the batch, nor on being sent back to wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from secateur.serve.engine import EngineStats, Event, Generation, GenerationFault
from secateur.serve.native import sampling
from secateur.serve.native.batch import Questions, Run, answer, make_batch, make_questions
from secateur.serve.native.pages import PagePool
from secateur.serve.native.scheduler import Plan, Scheduler
from secateur.serve.native.step import Floats, StepModel
from secateur.serve.output import Output
from secateur.serve.text import TextCodec
from secateur.serve.worker import WorkerEngine, failed

NOT_NUMBERS = "the logits are not numbers (NaN or infinite), or the schema allows no token"

Outcomes = dict[Run, Event | GenerationFault]


class NativeEngine(WorkerEngine):
    """See the module.

    Args:
        model: from now on only the worker touches it, and closes it at the end.
        codec: its tokenizer.
        model_name: the name to serve it under.
        max_running: requests computed at once; more wait.
        max_waiting: requests that wait; more are refused as `EngineBusy`.
        token_budget: prompt tokens of a step, besides one token of each running request.
        deadline: seconds that a request may take, waiting included; None: any.
        report: see `Engine.report`.
    """

    name = "native"

    def __init__(
        self,
        model: StepModel,
        codec: TextCodec,
        *,
        model_name: str,
        max_running: int = 64,
        max_waiting: int = 256,
        token_budget: int = 256,
        deadline: float | None = None,
        report: Iterable[str] = (),
    ) -> None:
        super().__init__(max_waiting)
        self.model_name = model_name
        self.codec = codec
        self.vocabulary_size = model.vocabulary_size
        self.max_length = min(model.max_length, model.pages * model.page_tokens)
        self.end_tokens = model.eos_token_ids
        if not self.end_tokens and codec.eos_token_id is not None:
            self.end_tokens = frozenset({codec.eos_token_id})
        self.description = model.description
        self._report = tuple(report)
        self._model = model
        self._pool = PagePool(model.pages, model.page_tokens)
        self._scheduler: Scheduler[Run] = Scheduler(
            self._pool, max_running=max_running, prompt_budget=token_budget, deadline=deadline
        )
        self._start()

    def stats(self) -> EngineStats:
        """How busy the engine is now."""
        with self._changed:
            scheduler = self._scheduler
            return EngineStats(
                running=len(scheduler.running),
                waiting=scheduler.waiting,
                pages=self._pool.pages,
                pages_used=self._pool.used,
                prefix_queries=scheduler.prefix_queries,
                prefix_hits=scheduler.prefix_hits,
                preemptions=scheduler.preemptions,
            )

    def report(self) -> tuple[str, ...]:
        """What computes what."""
        return self._report

    def _queue(self, generation: Generation, output: Output) -> None:
        self._scheduler.add(Run(generation, output))

    def _count_waiting(self) -> int:
        return self._scheduler.waiting

    def _clear(self, last: Event | GenerationFault) -> None:
        with self._changed:
            Generation.deliver_all([(run.generation, last) for run in self._scheduler.clear()])

    def _serve(self) -> None:
        try:
            while (plan := self._next_plan()) is not None:
                self._step(plan)
        finally:
            self._model.close()

    def _next_plan(self) -> Plan[Run] | None:
        """Wait for something to do; None when the engine is to end."""
        with self._changed:
            while True:
                now = time.monotonic()
                if now >= self._end:
                    self._clear(Event(None, finish_reason="abort"))
                    return None
                if late := self._scheduler.sweep(now):
                    limit = (
                        f"the request took longer than {self._scheduler.deadline:g} s, the limit"
                    )
                    fault = GenerationFault(limit)
                    Generation.deliver_all([(run.generation, fault) for run in late])
                if plan := self._scheduler.plan():
                    return plan
                self._changed.wait()

    def _step(self, plan: Plan[Run]) -> None:
        """Compute a plan; what fails in it, fails alone."""
        for run, _ in plan:
            if run.generation.started is None:
                run.generation.started = time.monotonic()
        questions = make_questions(plan)
        try:
            logits = self._model.step(make_batch(plan, questions.wanted))
        except Exception as fault:
            if len(plan) == 1:
                return self._finish_step([], {plan[0][0]: failed(fault)})
            logits = None
        if logits is None:  # whoever it was: each once more, alone
            for item in plan:
                self._step([item])
            return
        self._finish_step(plan, self._outcomes(plan, questions, logits))

    def _outcomes(self, plan: Plan[Run], questions: Questions, logits: Floats) -> Outcomes:
        """What each request gets out of a step that was computed, if anything."""
        choices, scores = answer(questions, logits)
        outcomes: Outcomes = {}
        for (run, _, _), score in zip(questions.scores, scores, strict=True):
            assert run.output.prompt_logprobs is not None
            run.output.prompt_logprobs.append(score)
            if math.isnan(score.logprob):
                outcomes[run] = failed(ValueError(NOT_NUMBERS))
        for run, count in plan:
            if run.remaining == count and not run.output.room:
                outcomes.setdefault(run, run.output.nothing())
        for (run, _), (token, details) in zip(questions.choices, choices, strict=True):
            if token == sampling.REFUSED:
                outcomes[run] = failed(ValueError(NOT_NUMBERS))
            elif run not in outcomes:
                run.tokens.append(token)
                try:
                    outcomes[run] = run.output.add(token, details)
                except ValueError as fault:  # of the grammar that the text has to follow
                    outcomes[run] = failed(fault)
        return outcomes

    def _finish_step(self, plan: Plan[Run], outcomes: Outcomes) -> None:
        """Write down what was computed, and hand it over."""
        with self._changed:
            for run, count in plan:
                if not isinstance(outcomes.get(run), GenerationFault):  # nobody else may find it
                    self._scheduler.advance(run, count)
            for run, outcome in outcomes.items():
                if isinstance(outcome, GenerationFault) or outcome.finish_reason is not None:
                    self._scheduler.finish(run)
                    self._ended.append(time.monotonic())
        # Only now: who reads it may look at stats().
        Generation.deliver_all([(run.generation, outcome) for run, outcome in outcomes.items()])
