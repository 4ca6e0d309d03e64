"""The native sampler: for a whole batch what `secateur.serve.sampling` does for one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.compile import _kernels
from secateur.serve.sampling import SamplingParameters, TokenLogprobs

Sampler = _kernels.Sampler
REFUSED = -1
_ALL = 2**31 - 1  # more than any vocabulary, and a number that C++ has

Floats = np.ndarray[Any, np.dtype[np.float32]]


def make_sampler(parameters: SamplingParameters, prompt: Sequence[int]) -> Sampler:
    """How one sequence chooses its tokens; it remembers what it chose, for the penalties.

    Args:
        parameters: all but the seed are read.
        prompt: token ids below the vocabulary's size, as those of the bias.
    """
    return Sampler(
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=min(parameters.top_k, _ALL),
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        logit_bias=parameters.logit_bias,
        prompt=prompt if parameters.repetition_penalty != 1.0 else (),
    )


def sample(
    samplers: Sequence[Sampler], logits: Floats, rows: Sequence[int], uniforms: Sequence[float]
) -> list[int]:
    """Choose a token for each of some rows.

    Args:
        samplers: one for each row.
        logits: float32 ``[n, vocabulary]``.
        rows: which of the n rows.
        uniforms: a number in [0, 1) for each row; a greedy choice does not read it.

    Returns:
        Token ids; `REFUSED` where the logits hold NaN or nothing finite: the model is broken.
    """
    return _kernels.sample(
        samplers, logits, np.array(rows, dtype=np.int32), np.array(uniforms, dtype=np.float64)
    )


def logprobs(logits: Floats, asked: Sequence[tuple[int, int, int]]) -> list[TokenLogprobs]:
    """The log-probabilities of some tokens and of the most likely ones beside them.

    Args:
        logits: float32 ``[n, vocabulary]``, as the model gave them.
        asked: (row, token, number of alternatives) each; NaN is answered where the row has one.
    """
    if not asked:
        return []
    scored = _kernels.logprobs(logits, *np.array(asked, dtype=np.int32).T.copy())
    return [
        TokenLogprobs(token, logprob, tuple(top))
        for (_, token, _), (logprob, top) in zip(asked, scored, strict=True)
    ]
