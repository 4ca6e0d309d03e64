"""The answers of the OpenAI API, made from an engine's events.

A stream sends one delta per event; an answer in one piece is the sum of the same deltas. So both
say the same by construction.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from secateur.serve.engine import Event, Generation
from secateur.serve.sampling import TokenLogprobs
from secateur.serve.text import TextCodec, TokenStream


class Answer(ABC):
    """What the two kinds of answers share.

    Args:
        model: name to state as the model's.
        codec: the model's tokenizer.
        generations: one per choice, in order.
        per_prompt: choices of each prompt.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self, model: str, codec: TextCodec, generations: Sequence[Generation], per_prompt: int
    ) -> None:
        self._codec = codec
        self._model = model
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompt_tokens = sum(
            len(generation.request.prompt) for generation in generations[::per_prompt]
        )
        self._completion_tokens = 0
        self._parts: list[list[dict[str, Any]]] = [[] for _ in generations]

    @abstractmethod
    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """What an event adds to a choice, in the form of a stream's chunk."""

    @abstractmethod
    def join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """One whole choice from its deltas."""

    def usage(self) -> dict[str, int]:
        """The token counts so far."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def deltas(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Take an event; returns what a stream sends for it."""
        self._completion_tokens += event.token_id is not None
        return [self.delta(index, event)]

    def keep(self, index: int, event: Event) -> None:
        """Take an event for `whole`."""
        self._completion_tokens += event.token_id is not None
        self._parts[index].append(self.delta(index, event))

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, from all that was kept."""
        choices = [self.join(parts) for parts in self._parts]
        return self._envelope(self.whole_object, choices) | {"usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]], *, with_usage: bool) -> bytes:
        """A server-sent event; without choices it carries the token counts."""
        content = self._envelope(self.chunk_object, choices)
        if with_usage:
            content["usage"] = None if choices else self.usage()
        return server_sent(content)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def server_sent(content: dict[str, Any]) -> bytes:
    """One ``data:`` line of an event stream."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _finite(logprob: float) -> float:
    """JSON has no infinity; the OpenAI API writes -9999 for an impossible token."""
    return max(logprob, -9999.0)


class CompletionAnswer(Answer):
    """Answer to ``/v1/completions``.

    Args:
        model: see `Answer`.
        codec: see `Answer`.
        generations: see `Answer`.
        per_prompt: see `Answer`.
        echoes: per choice the text to repeat before the answer, or None.
        logprobs: whether log-probabilities were asked for.
    """

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        generations: Sequence[Generation],
        per_prompt: int,
        *,
        echoes: Sequence[str | None],
        logprobs: bool,
    ) -> None:
        super().__init__(model, codec, generations, per_prompt)
        self._prompts = [generation.request.prompt for generation in generations]
        self._echoes = list(echoes)
        self._logprobs = logprobs
        self._offsets = [0] * len(self._echoes)
        self._streams = [TokenStream(codec) for _ in self._echoes]

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """See `Answer.delta`."""
        echo, self._echoes[index] = self._echoes[index], None
        logprobs: dict[str, list[Any]] | None = None
        if self._logprobs:
            logprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
            if echo is not None:
                known = event.prompt_logprobs or (None,) * len(self._prompts[index])
                for token, entry in zip(self._prompts[index], known, strict=True):
                    self._note(logprobs, index, token, entry)
                self._offsets[index] = len(echo)
                self._streams[index] = TokenStream(self._codec)
            if event.token_id is not None:
                self._note(logprobs, index, event.token_id, event.logprobs)
        return {
            "index": index,
            "text": (echo or "") + event.text,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }

    def _note(
        self, into: dict[str, list[Any]], index: int, token: int, entry: TokenLogprobs | None
    ) -> None:
        text = self._codec.token_text
        into["tokens"].append(text(token))
        into["text_offset"].append(self._offsets[index])
        self._offsets[index] += len(self._streams[index].feed(token))
        into["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        tops: dict[str, float] | None = None
        if entry is not None:
            tops = {}
            for other, logprob in (*entry.top, (token, entry.logprob)):
                tops.setdefault(
                    text(other), _finite(logprob)
                )  # of two with one text the likelier stays
        into["top_logprobs"].append(tops)

    def join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """See `Answer.join`."""
        whole = dict(parts[-1])
        whole["text"] = "".join(part["text"] for part in parts)
        if self._logprobs:
            whole["logprobs"] = {
                key: [item for part in parts for item in part["logprobs"][key]]
                for key in whole["logprobs"]
            }
        return whole


class ChatAnswer(Answer):
    """Answer to ``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, model: str, codec: TextCodec, generations: Sequence[Generation], per_prompt: int
    ) -> None:
        super().__init__(model, codec, generations, per_prompt)
        self._unopened = set(range(len(generations)))

    def deltas(self, index: int, event: Event) -> list[dict[str, Any]]:
        """As `Answer.deltas`; a choice opens with its role, not before its first token is there."""
        deltas = super().deltas(index, event)
        if index in self._unopened:
            self._unopened.remove(index)
            deltas.insert(
                0,
                {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
            )
        return deltas

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """See `Answer.delta`."""
        logprobs = None
        if event.logprobs is not None:
            tops = [self._entry(*top) for top in event.logprobs.top]
            entry = self._entry(event.logprobs.token_id, event.logprobs.logprob)
            logprobs = {"content": [{**entry, "top_logprobs": tops}], "refusal": None}
        return {
            "index": index,
            "delta": {"content": event.text},
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._codec.token_bytes(token)
        return {
            "token": self._codec.token_text(token),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }

    def join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """See `Answer.join`."""
        content = "".join(part["delta"]["content"] for part in parts)
        noted = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        logprobs = None
        if noted:
            entries = [entry for part in noted for entry in part["content"]]
            logprobs = {"content": entries, "refusal": None}
        return {
            "index": parts[-1]["index"],
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": parts[-1]["finish_reason"],
        }
