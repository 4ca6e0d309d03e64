"""``/v1/status``: the state of the server in one JSON object, for the page at ``/``."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict
from typing import Any

from secateur.serve.engine import Engine

WINDOW = 5.0  # seconds over which the speed is taken


class Speed:
    """Tokens per second over the last `WINDOW` seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def count(self, moment: float, tokens: int = 1) -> None:
        """Note tokens made at a moment (`time.monotonic`)."""
        self._marks.append((moment, tokens))
        self._forget(moment)

    def now(self) -> float:
        """The speed up to now."""
        self._forget(time.monotonic())
        return sum(tokens for _, tokens in self._marks) / WINDOW

    def _forget(self, now: float) -> None:
        while self._marks and self._marks[0][0] < now - WINDOW:
            self._marks.popleft()


def status(engine: Engine, speed: Speed) -> dict[str, Any]:
    """What runs, on what, how fast."""
    return {
        "model": engine.model_name,
        "engine": engine.name,
        "description": engine.description,
        "layers": list(engine.report()),
        "max_model_len": engine.max_length,
        "has_chat_template": engine.codec.has_chat_template,
        "tokens_per_second": round(speed.now(), 1),
        **asdict(engine.stats()),
    }
