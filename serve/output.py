"""What one request has generated so far: its text, and when it is over. Every engine uses it."""

from __future__ import annotations

from secateur.serve.constraint import Mask
from secateur.serve.engine import Event, FinishReason, GenerationRequest
from secateur.serve.sampling import TokenLogprobs
from secateur.serve.text import StopStrings, TextCodec, TokenStream


class Output:
    """Turns the chosen tokens of a request into events.

    Args:
        request: what was asked for.
        codec: the model's tokenizer.
        eos: tokens after which the model itself says that the text is over.
        limit: prompt and output together may have this many tokens.

    Attributes:
        tokens: chosen so far.
        room: how many there may be.
        prompt_logprobs: None if not asked for; else the engine appends those of the prompt's tokens
            after the first, before it adds a token.
    """

    def __init__(
        self, request: GenerationRequest, codec: TextCodec, eos: frozenset[int], limit: int
    ) -> None:
        self.tokens: list[int] = []
        self.room = limit - len(request.prompt)
        if request.max_tokens is not None:
            self.room = min(self.room, request.max_tokens)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self._ends = request.stop_token_ids | (frozenset() if request.ignore_eos else eos)
        self._stream = TokenStream(codec)
        self._stops = StopStrings(request.stop)
        self._constraint = request.constraint

    def allowed(self) -> Mask | None:
        """The tokens that may come next, see `Constraint.mask`; None: all.

        Raises:
            ValueError: see `Constraint.mask`.
        """
        return None if self._constraint is None else self._constraint.mask()

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> Event:
        """The event of the next token.

        Raises:
            ValueError: it was not `allowed`.
        """
        first = self._first()
        self.tokens.append(token)
        finish: FinishReason | None = None
        if token in self._ends:
            text, finish = self._stream.end(), "stop"
        else:
            text = self._stream.feed(token)
            if self._complete(token):
                finish = "stop"
            elif len(self.tokens) == self.room:
                text, finish = text + self._stream.end(), "length"
        text, stopped = self._stops.feed(text)
        if stopped:
            finish = "stop"
        elif finish:
            text += self._stops.end()
        return Event(token, text, logprobs, finish, first)

    def _complete(self, token: int) -> bool:
        """Whether the text fits its constraint and can only end after this token."""
        if self._constraint is None:
            return False
        self._constraint.accept(token)
        return self._constraint.ended

    def nothing(self) -> Event:
        """The only event of a request that has no room for a token."""
        return Event(None, finish_reason="length", prompt_logprobs=self._first())

    def _first(self) -> tuple[TokenLogprobs | None, ...] | None:
        """The prompt's log-probabilities, in the first event."""
        if self.tokens or self.prompt_logprobs is None:
            return None
        return tuple(self.prompt_logprobs)
