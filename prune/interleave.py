"""Pruning and healing in turns: what each round removes, and what it trains on.

Wang et al. 2025, "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model
Training", section 3.3 (Adapt-Accel), find that to prune a little, train, and prune again hurts less
than to prune all at once and train as long.

After round k of n the part P k/n of the original weights is gone. As a round begins with what the
last one left, its own pattern is

    P_k = 1 - (1 - P k/n) / (1 - P (k-1)/n)
"""

from __future__ import annotations

from fractions import Fraction

from secateur.errors import UsageError
from secateur.pattern import Pattern
from secateur.prune.narrowing import is_structured
from secateur.recipe import Heal, Prune


def share_of_round(prune: Prune, heal: Heal, number: int) -> tuple[Prune, Heal]:
    """The recipe's sections for one of ``heal.rounds`` rounds.

    Args:
        number: of the round, from 0.

    Raises:
        UsageError: the method zeroes weights, which cannot be done in rounds.
    """
    if heal.rounds == 1:
        return prune, heal
    if not is_structured(prune.method):
        raise UsageError(
            f"{prune.method!r} in {heal.rounds} rounds: a later one would begin with a model whose "
            "removed weights are still there as zeros",
            "use a structured method, e.g. adapt, or heal.rounds: 1",
        )
    removed = prune.pattern.removed
    left = [1 - removed * Fraction(number + ahead, heal.rounds) for ahead in (0, 1)]
    part = Pattern.parse(f"{float(100 * (1 - left[1] / left[0])):.4f}%")
    tokens = heal.tokens * (number + 1) // heal.rounds - heal.tokens * number // heal.rounds
    return (
        prune.model_copy(update={"pattern": part}),
        heal.model_copy(update={"tokens": max(1, tokens), "seed": heal.seed + number}),
    )
