"""What can go wrong, said in one sentence with the way out of it.

SecateurError          exit 1   a bug, if nothing more precise was raised
├── UsageError         exit 2   a flag, a recipe key, an output path: the caller's to change
├── ModelError         exit 3   a model or a text that is missing, broken or unsupported
├── EnvironmentFault   exit 4   this machine lacks something: a port, a library, a network
└── GateFailed         exit 5   a result that was measured and is not as good as was asked
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class SecateurError(Exception):
    """An expected failure.

    Args:
        what: one sentence: what is wrong and what was there instead.
        fix: what to do about it; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class UsageError(SecateurError):
    """A command line, recipe or output path that cannot be obeyed."""

    exit_code = 2


class ModelError(SecateurError):
    """A model or text that is missing, damaged or of a kind secateur does not support."""

    exit_code = 3


class EnvironmentFault(SecateurError):
    """Something this machine does not have or does not allow."""

    exit_code = 4


class GateFailed(SecateurError):
    """A measured result that is not as good as was asked.

    Args:
        what, fix: as of every `SecateurError`.
        result: what was measured, as plain data; ``--json`` prints it beside the error.
    """

    exit_code = 5

    def __init__(self, what: str, fix: str, result: dict[str, Any]) -> None:
        super().__init__(what, fix)
        self.result = result


EXIT_INTERRUPTED = 130


def some(names: Sequence[str]) -> str:
    """The first of many names and how many more there are; of four or fewer, all."""
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A hint that names the nearest option, or else all of them."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}? (known: {', '.join(options)})"
    return f"choose one of: {', '.join(options)}"
