"""Answers that follow a JSON schema: which tokens may come next.

The grammar is llguidance's, an optional dependency (extra ``structured``). Nothing here knows an
engine: it asks for the mask before it draws a token, and says which one it drew.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.serve.text import TextCodec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = NDArray[np.uint32]

ANY_OBJECT = '{"type": "object"}'

# Without a bound a model may write white space for ever.
_WRITING = {"whitespace_pattern": r"[ \n\t]{0,16}"}


class SchemaRefused(ValueError):
    """A schema that cannot be followed, or not here; the text says why."""


class Constraint:
    """Follows one sequence through a grammar; not safe to use from two threads at once.

    Args:
        matcher: llguidance's state of the grammar.
        vocabulary_size: bits of a mask.
    """

    def __init__(self, matcher: LLMatcher, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocabulary_size // 32)

    @property
    def ended(self) -> bool:
        """Whether the text is complete, so that nothing may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> Mask:
        """The tokens that may come next: uint32 ``[ceil(vocabulary / 32)]``, lowest bit first.

        Raises:
            ValueError: the grammar has failed, e.g. it became too complex.
        """
        raw = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        self._check()
        mask = np.zeros(self._words, dtype=np.uint32)
        mask[: len(raw)] = raw[: self._words]
        return mask

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            ValueError: the mask did not allow it.
        """
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Constraint:
        """The same state for another sequence."""
        twin = object.__new__(Constraint)
        twin._matcher, twin._words = self._matcher.deep_copy(), self._words
        return twin

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the schema's grammar failed: {self._matcher.get_error()}")


class Grammars:
    """Makes constraints for one model; safe to use from several threads.

    Args:
        codec: the model's tokenizer.
        vocabulary_size: of the model; the tokenizer may have fewer or more.
        ends: the model's end-of-sequence tokens.
    """

    def __init__(self, codec: TextCodec, vocabulary_size: int, ends: Iterable[int]) -> None:
        self._codec = codec
        self._size = vocabulary_size
        self._ends = sorted(ends)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as fault:
            raise SchemaRefused(
                "structured output needs llguidance on the server: "
                "pip install 'secateur[structured]'"
            ) from fault
        backend: Any = getattr(self._codec.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise SchemaRefused("structured output needs a tokenizer that has a tokenizer.json")
        size = max(self._size, backend.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=self._ends or None)

    def compile(self, schema: str) -> Constraint:
        """The constraint that only lets texts through that are JSON and fit the schema.

        May take a second; call it in a thread.

        Args:
            schema: JSON Schema as JSON text.

        Raises:
            SchemaRefused: llguidance is missing, or does not understand the schema.
        """
        tokenizer = self._tokenizer  # first: it says so if llguidance is missing
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_WRITING)
        except ValueError as fault:
            raise SchemaRefused(f"the schema is not valid: {fault}") from fault
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = str(matcher.get_error()).partition("\n")[0]
            raise SchemaRefused(f"the schema cannot be followed: {reason}")
        constraint = Constraint(matcher, self._size)
        if not constraint.mask().any():
            raise SchemaRefused("the schema fits no text at all")
        return constraint
