"""Chat templates: small Jinja programs that a model brings along, run in a sandbox.

The environment is that of ``transformers.utils.chat_template_utils`` (5.x): the same options,
filters and functions, so that a template writes the same text here and there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # a rendering may take
CHARACTERS = 16 * 2**20  # and write


class ChatTemplate:
    """A compiled template; safe to use from several threads.

    Args:
        source: Jinja source.
        tokens: the special tokens by role (``bos_token`` and so on), as the template sees them.

    Raises:
        jinja2.TemplateError: the source is not Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        self._compiled = _environment().from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as text, up to where the assistant's answer begins.

        Time and output are bounded. A single call of a built-in that takes long, or the memory of
        variables, is not: templates come with the model, not from those who send requests.

        Args:
            messages: dicts of strings.

        Raises:
            jinja2.TemplateError: the template refuses these messages, or takes too long.
        """
        parts, size = [], 0
        with _time_limit(SECONDS):
            for part in self._compiled.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            ):
                size += len(part)
                if size > CHARACTERS:
                    raise jinja2.TemplateError(f"it writes more than {CHARACTERS} characters")
                parts.append(part)
        return "".join(parts)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop the Python code of this thread after some time, wherever it is."""
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise jinja2.TemplateError(f"it takes longer than {seconds:g} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _Generation(Extension):
    """Accepts ``{% generation %}``, which marks what training learns from, and does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a namespace")


class _Dict:
    """``dict`` without the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
