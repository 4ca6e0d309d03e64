"""From logits to a token: pure numpy functions, the same for every engine.

Order: logit_bias → penalties → allowed tokens → temperature (0: argmax) → min_p → top_k → top_p →
draw.
Log-probabilities are those of the model itself: before bias, penalties and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]
Ids: TypeAlias = NDArray[np.int64]

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is chosen; the defaults draw from the model's own distribution.

    Attributes:
        temperature: 0 chooses the most likely token.
        top_p: keep the most likely tokens until their probabilities reach this sum, in (0, 1].
        top_k: keep this many of the most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in
            the prompt or in the output; 1 does nothing.
        presence_penalty: subtracted once from tokens that stand in the output.
        frequency_penalty: subtracted from a token as often as it stands in the output.
        logit_bias: (token id, number added to its logit) pairs.
        seed: makes the draws repeatable; None draws differently each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The natural logarithm of a token's probability, and the most likely alternatives.

    Attributes:
        token_id: the token that stands at this position.
        logprob: its log-probability.
        top: (token id, log-probability) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def adjusted(
    logits: Floats,
    parameters: SamplingParameters,
    prompt: Sequence[int],
    output: Sequence[int],
) -> NDArray[np.float64]:
    """The logits with bias and penalties.

    Args:
        logits: (vocabulary,), left as they are.
        parameters: bias and penalties are read.
        prompt: token ids of the prompt.
        output: token ids generated so far.
    """
    scores = logits.astype(np.float64)
    for token, bias in parameters.logit_bias:
        scores[token] += bias
    penalty = parameters.repetition_penalty
    if penalty != 1.0:
        seen = np.unique(
            np.concatenate([np.asarray(ids, dtype=np.int64) for ids in (prompt, output)])
        )
        at = scores[seen]
        scores[seen] = np.where(at > 0, at / penalty, at * penalty)
    if output and (parameters.presence_penalty or parameters.frequency_penalty):
        tokens, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        scores[tokens] -= parameters.presence_penalty + parameters.frequency_penalty * counts
    return scores


def distribution(scores: Floats, parameters: SamplingParameters) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities, after temperature and the filters.

    Equally likely tokens are ranked by id, so that the result does not depend on a sort.

    Args:
        scores: (vocabulary,), after `adjusted`.
        parameters: temperature (above 0), min_p, top_k and top_p are read.

    Returns:
        token ids (k,) and probabilities (k,) that sum to 1.
    """
    with np.errstate(over="ignore"):  # a tiny temperature may send the losers to -inf: right
        weights = np.exp((scores.astype(np.float64) - scores.max()) / parameters.temperature)
    weights[weights <= 1e-306] = 0.0  # as the native sampler, which knows no subnormal numbers
    ids: Ids = np.arange(len(weights))
    if parameters.min_p > 0.0:
        ids = ids[weights >= parameters.min_p]  # the most likely token has weight 1
    if 0 < parameters.top_k < len(ids):
        bar = np.partition(weights[ids], -parameters.top_k)[-parameters.top_k]
        ids = ids[weights[ids] >= bar]
        ids = _ranked(ids, weights)[: parameters.top_k]
    if parameters.top_p < 1.0:
        mass = weights[ids].sum()
        # What lies below this bar adds up to less than 1 - top_p, so none of it can be kept:
        # only the few tokens above it need sorting.
        bar = (1.0 - parameters.top_p) * mass / len(ids) * (1.0 - 1e-9)
        ids = _ranked(ids[weights[ids] >= bar], weights)
        reached = np.cumsum(weights[ids])
        ids = ids[: int(np.searchsorted(reached, parameters.top_p * mass, side="left")) + 1]
    kept = weights[ids]
    return ids, kept / kept.sum()


def _ranked(ids: Ids, weights: NDArray[np.float64]) -> Ids:
    ids = np.sort(ids)
    return ids[np.argsort(-weights[ids], kind="stable")]


def draw(ids: Ids, probabilities: NDArray[np.float64], uniform: float) -> int:
    """The token at which the running sum of the probabilities passes ``uniform`` in [0, 1)."""
    reached = np.cumsum(probabilities)
    at = np.searchsorted(reached, uniform * reached[-1], side="right")
    last = np.searchsorted(reached, reached[-1], side="left")  # tokens after it have probability 0
    return int(ids[min(at, last)])


def sample(
    logits: Floats,
    parameters: SamplingParameters,
    prompt: Sequence[int],
    output: Sequence[int],
    generator: np.random.Generator,
    allowed: NDArray[np.uint32] | None = None,
) -> int:
    """Choose the next token; takes one number from ``generator`` unless the choice is greedy.

    Args:
        logits: (vocabulary,), as the model gave them.
        parameters: how to choose.
        prompt: token ids of the prompt.
        output: token ids generated so far.
        generator: of this sequence.
        allowed: one bit per token, lowest first, uint32 ``[ceil(vocabulary / 32)]``: only these
            tokens can be chosen; None: all. Applied after bias and penalties.

    Raises:
        ValueError: the logits hold NaN, or nothing finite: the model is broken.
    """
    scores = adjusted(logits, parameters, prompt, output)
    if not np.isfinite(scores.max()):
        raise ValueError("the model's logits are not numbers (NaN or infinite)")
    if allowed is not None:
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")[: len(scores)]
        scores[bits == 0] = -np.inf
        if scores.max() == -np.inf:
            raise ValueError("no token is both allowed and possible")
    if parameters.temperature < GREEDY_BELOW:
        return int(scores.argmax())
    return draw(*distribution(scores, parameters), generator.random())


def logprobs(logits: Floats, token: int, count: int) -> TokenLogprobs:
    """The log-probability of ``token`` and of the ``count`` most likely tokens.

    Args:
        logits: (vocabulary,), as the model gave them.
        token: the token that was chosen.
        count: number of alternatives; 0 for none.
    """
    scores = logits.astype(np.float64)
    best = scores.max()
    total = best + np.log(np.exp(scores - best).sum())
    top: Ids = np.empty(0, dtype=np.int64)
    if count > 0:
        bar = np.partition(scores, -count)[-count] if count < len(scores) else -np.inf
        top = _ranked(np.flatnonzero(scores >= bar), scores)[:count]
    return TokenLogprobs(
        token,
        float(scores[token] - total),
        tuple((int(other), float(scores[other] - total)) for other in top),
    )
