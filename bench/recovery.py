"""How much of the dense accuracy on tasks is left, how sure that is, and if it is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.bench.results import (
    AccuracyResult,
    Estimate,
    Gate,
    GateName,
    Interval,
    ModelAccuracy,
    TaskScore,
)
from secateur.bench.tasks import Answers, Task
from secateur.errors import GateFailed, ModelError, UsageError

_RESAMPLES, _AT_ONCE = 10_000, 500


def recovery(model: Sequence[Sequence[float]], dense: Sequence[Sequence[float]]) -> Interval | None:
    """Mean score over tasks / the same of the dense model, with a paired bootstrap's interval.

    Items are drawn anew within each task, the same ones for both models, 10000 times (seed 0); the
    interval holds the ratios from the 2.5th to the 97.5th percentile (Efron & Tibshirani 1993,
    chapter 13). What makes an item hard moves both models, so it hardly widens the interval.

    Args:
        model: of each task the score of each item.
        dense: likewise, of the same items.

    Returns:
        None if the dense model gives no right answer: there is nothing to recover.
    """
    totals = np.zeros((2, _RESAMPLES))  # means summed over tasks: of the model, of dense
    draw = np.random.default_rng(0)
    for own, base in zip(model, dense, strict=True):
        scores = np.array([own, base])
        n = scores.shape[1]
        for start in range(0, _RESAMPLES, _AT_ONCE):
            picked = draw.integers(n, size=(_AT_ONCE, n))
            totals[:, start : start + _AT_ONCE] += scores[:, picked].mean(-1)
    value = sum(map(np.mean, model)), sum(map(np.mean, dense))
    if value[1] == 0:
        return None
    ratios = totals[0, totals[1] > 0] / totals[1, totals[1] > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(value=float(value[0] / value[1]), low=float(low), high=float(high))


def with_tasks(
    row: ModelAccuracy,
    tasks: Sequence[Task],
    answers: Mapping[str, Answers],
    baseline: Mapping[str, Answers] | None,
) -> ModelAccuracy:
    """The row with the scores of its tasks, and what it recovers of the baseline's."""
    scores = tuple(
        _score(task, answers[task.name], baseline[task.name] if baseline else None)
        for task in tasks
    )
    whole = None
    if baseline is not None:
        names = [task.name for task in tasks]
        whole = recovery([answers[n].acc for n in names], [baseline[n].acc for n in names])
    return row.model_copy(update={"tasks": scores, "recovery": whole})


def parse_share(text: str) -> float:
    """Read ``10%`` or ``0.1``.

    Raises:
        UsageError: it is neither, or negative.
    """
    percent = text.endswith("%")
    try:
        share = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < np.inf:
        raise UsageError(f"{text!r} is no share", "write 10% or 0.1")
    return share


def require_grounds(
    against: object, tasks: object, min_recovery: float | None, max_increase: float | None
) -> None:
    """Refuse limits, before anything is measured, that nothing will be measured for.

    Raises:
        UsageError: a limit without a dense model, or of recovery without tasks.
    """
    if against is None and (min_recovery, max_increase) != (None, None):
        raise UsageError("a limit is relative to a dense model, and none is given", "add --against")
    if min_recovery is not None and not tasks:
        raise UsageError(
            "recovery is that of accuracy on tasks, and none is given",
            "add --task, or use --max-ppl-increase",
        )


def check_gates(
    result: AccuracyResult, min_recovery: float | None, max_increase: float | None
) -> AccuracyResult:
    """The result with its gates: one for each model and limit.

    Args:
        result: what `require_grounds` asks for.
        min_recovery: the least recovery, e.g. 0.99; None: no such gate.
        max_increase: the greatest increase of perplexity, e.g. 0.1; None: no such gate.

    Raises:
        ModelError: the dense model has no right answer, and recovery is asked for.
    """
    gates = []
    for model in result.models:
        if min_recovery is not None:
            kept = model.recovery
            if kept is None:
                raise ModelError(
                    "the dense model gives no right answer: there is nothing to recover",
                    "give it tasks that it can do, or more items",
                )
            clear = not kept.low < min_recovery <= kept.high
            passed = kept.value >= min_recovery
            gates.append(_gate(model, "recovery", min_recovery, kept.value, passed, clear))
        if max_increase is not None and model.perplexity_ratio:
            value, error = model.perplexity_ratio.value - 1, model.perplexity_ratio.standard_error
            clear = error is not None and abs(value - max_increase) >= 2 * error
            passed = value <= max_increase
            gates.append(_gate(model, "perplexity_increase", max_increase, value, passed, clear))
    return result.model_copy(update={"gates": tuple(gates)})


def _gate(
    model: ModelAccuracy, name: GateName, limit: float, value: float, passed: bool, certain: bool
) -> Gate:
    return Gate(
        path=model.path, name=name, limit=limit, value=value, passed=passed, certain=certain
    )


def refuse_failed(result: AccuracyResult) -> None:
    """Raise if a gate is not passed.

    Raises:
        GateFailed: names every gate that is not passed, with the whole result.
    """
    failed = [gate for gate in result.gates if not gate.passed]
    if failed:
        raise GateFailed(
            "; ".join(
                f"{gate.path}: {gate.name.replace('_', ' ')} {gate.value:.4f}, "
                f"{'at least' if gate.name == 'recovery' else 'at most'} {gate.limit:g} was asked"
                f"{'' if gate.certain else ' (too close to tell on so few samples)'}"
                for gate in failed
            ),
            "prune less, or choose another method or value type",
            result.to_json(),
        )


def _score(task: Task, own: Answers, dense: Answers | None) -> TaskScore:
    ones = [1.0] * len(own.acc)
    return TaskScore(
        name=task.name,
        sha256=task.sha256,
        items=len(own.acc),
        acc=Estimate.of(own.acc, ones),
        acc_norm=Estimate.of(own.norm, ones) if own.norm else None,
        recovery=recovery([own.acc], [dense.acc]) if dense else None,
        right=own.acc,
    )
