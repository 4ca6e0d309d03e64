"""A conversation with an engine in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jinja2

from secateur.errors import UsageError
from secateur.serve.engine import Engine, GenerationRequest


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back.

    Attributes:
        text: the answer.
        tokens: tokens of it.
        first_token: seconds until the first of them.
        seconds: from the first to the last.
        ending: the finish reason, or "interrupted".
    """

    text: str
    tokens: int
    first_token: float
    seconds: float
    ending: str


class Conversation:
    """Turns so far, and the next answer; without a chat template the text is simply continued.

    Args:
        engine: what answers.
        shape: how to sample and when to stop; its prompt is not used.
        system: what the model is told before anything else.
    """

    def __init__(self, engine: Engine, shape: GenerationRequest, system: str | None = None) -> None:
        self._engine = engine
        self._shape = shape
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._text = self._system or ""
        self._turns = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, line: str, show: Callable[[str], None]) -> Reply:
        """Send a message and receive the answer; an interrupt (SIGINT) ends the answer only.

        Args:
            line: the message.
            show: called with each piece of the answer.

        Raises:
            UsageError: the chat template refuses the conversation.
            RequestRefused: the conversation has become too long.
            GenerationFault: the generation failed.
        """
        turns = [*self._turns, {"role": "user", "content": line}]
        codec = self._engine.codec
        if not codec.has_chat_template:
            prompt = codec.encode(self._text + line)
        else:
            try:
                prompt = codec.encode(codec.render_chat(turns), special=False)
            except jinja2.TemplateError as fault:
                raise UsageError(
                    f"the model's chat template refuses this conversation: {fault}",
                    "begin a new one with /reset; some templates know no --system",
                ) from fault
        reply = asyncio.run(self._receive(replace(self._shape, prompt=tuple(prompt)), show))
        self._turns = [*turns, {"role": "assistant", "content": reply.text}]
        self._text += line + reply.text
        return reply

    async def _receive(self, request: GenerationRequest, show: Callable[[str], None]) -> Reply:
        generation = self._engine.submit(request)
        parts: list[str] = []
        times: list[float] = []
        ending = "interrupted"
        try:
            async for event in generation:
                parts.append(event.text)
                if event.token_id is not None:
                    times.append(event.time)
                ending = event.finish_reason or ending
                show(event.text)
        except asyncio.CancelledError:  # what asyncio.run makes of SIGINT
            ending = "interrupted"
        finally:
            generation.cancel()
        first = times[0] if times else time.monotonic()
        last = times[-1] if times else first
        return Reply("".join(parts), len(times), first - generation.submitted, last - first, ending)
