"""What the scheduler needs of a model: one call that advances a ragged batch by one step.

A batch holds several sequences, each with one or more new tokens: a piece of a prompt, or the token
sampled last. The keys and values of a sequence lie in pages of the KV cache; its page table says
in which, in order. The scheduler owns the tables, the model owns the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens of S sequences, n in all.

    Attributes:
        tokens: int32 ``[n]``, sequence after sequence.
        starts: int32 ``[S + 1]``: the tokens of sequence s are ``tokens[starts[s]:starts[s + 1]]``.
        positions: int32 ``[S]``: how many tokens of the sequence are in the cache already.
        tables: int32 ``[S, P]``: page numbers; row s must cover all tokens of sequence s, with
            the new ones; what lies behind is not read.
        wanted: int32 ``[w]``, rising: of which of the n tokens logits are wanted.
    """

    tokens: Ints
    starts: Ints
    positions: Ints
    tables: Ints
    wanted: Ints


class StepModel(Protocol):
    """A model with a paged KV cache.

    Attributes:
        vocabulary_size: logits per token.
        max_length: tokens that a sequence may have.
        page_tokens: tokens of a page.
        pages: how many pages there are, numbered from 0.
        eos_token_ids: tokens after which the model itself says that the text is over.
        description: facts for the log: types, layouts, threads, bytes.
    """

    vocabulary_size: int
    max_length: int
    page_tokens: int
    pages: int
    eos_token_ids: frozenset[int]

    @property
    def description(self) -> str:
        """See above."""

    def step(self, batch: Batch) -> Floats:
        """Compute the new tokens, keep their keys and values.

        Returns:
            Logits float32 ``[w, vocabulary_size]``, good until the next step.

        Raises:
            ValueError: the batch contradicts itself or the model.
        """

    def close(self) -> None:
        """Free the memory."""
