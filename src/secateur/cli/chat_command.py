"""``secateur chat``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from typer import Option

from secateur.cli import app
from secateur.cli.serve_command import (
    CacheType,
    Directory,
    Engine,
    HeadValues,
    MaxLength,
    Threads,
    Values,
)

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.serve.chat import Conversation, Reply

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not steer the terminal


@app.command()
def chat(
    directory: Directory,
    engine: Engine = "auto",
    system: Annotated[str | None, Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[
        int | None, Option(min=1, help="Tokens of an answer. [default: what the context holds]")
    ] = None,
    temperature: Annotated[float, Option(min=0, max=2, help="0: always the likeliest.")] = 0.7,
    top_p: Annotated[float, Option(help="Sum of probabilities to draw from, above 0.")] = 1.0,
    top_k: Annotated[int, Option(min=0, help="Tokens to draw from; 0: all.")] = 0,
    min_p: Annotated[float, Option(min=0, max=1, help="Share of the likeliest token's.")] = 0.0,
    repetition_penalty: Annotated[float, Option(help="Above 1 avoids repetition.")] = 1.0,
    seed: Annotated[int | None, Option(min=0, help="Makes the answers repeatable.")] = None,
    threads: Threads = None,
    kv_cache_type: CacheType = None,
    values: Values = None,
    head_values: HeadValues = None,
    max_length: MaxLength = None,
) -> None:
    """Talk to a model in the terminal: /reset begins anew, /exit ends, Ctrl-C stops an answer.

    Each line is a message. A model without a chat template continues the text instead. Answers go
    to stdout, everything else to stderr; lines may come from a pipe.

    Example: secateur chat pruned/ --temperature 0
    """
    from secateur.errors import UsageError
    from secateur.serve import NativeOptions, load

    if not 0 < top_p <= 1 or not 0.01 <= repetition_penalty <= 10:
        raise UsageError(
            f"--top-p {top_p:g}, --repetition-penalty {repetition_penalty:g}: out of range",
            "give --top-p above 0, at most 1; --repetition-penalty from 0.01 to 10",
        )
    options = NativeOptions(
        kv_cache_type=kv_cache_type,
        values=values,
        head_values=head_values,
        max_length=max_length,
    )
    loaded = load(directory, engine=engine, threads=threads, options=options)
    from rich.console import Console

    from secateur.serve.chat import Conversation
    from secateur.serve.engine import GenerationRequest
    from secateur.serve.sampling import SamplingParameters

    sampling = SamplingParameters(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    notes = Console(stderr=True, highlight=False, markup=False)
    notes.print(f"{loaded.model_name} ({loaded.name}; {loaded.description})", style="dim")
    if not loaded.codec.has_chat_template:
        notes.print("this model has no chat template: it continues your text", style="dim")
    shape = GenerationRequest((), sampling, max_tokens=max_tokens)
    try:
        _talk(Conversation(loaded, shape, system), notes)
    finally:
        loaded.close()


def _talk(conversation: Conversation, notes: Console) -> None:
    from secateur.serve.engine import GenerationFault, RequestRefused

    for line in _lines():
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            conversation.reset()
            notes.print("a new conversation", style="dim")
        elif line.strip():
            try:
                reply = conversation.say(line, _show)
            except (RequestRefused, GenerationFault) as fault:
                notes.print(f"error: {fault}; /reset begins a new conversation", style="red")
            else:
                print(flush=True)
                notes.print(_facts(reply), style="dim")


def _lines() -> Iterator[str]:
    """What the user types, until end of file or Ctrl-C."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


def _show(text: str) -> None:
    print(_CONTROLS.sub("", text), end="", flush=True)


def _facts(reply: Reply) -> str:
    speed = f"{(reply.tokens - 1) / reply.seconds:.1f} tokens/s, " if reply.seconds else ""
    return (
        f"[{reply.tokens} tokens, {speed}first after {reply.first_token * 1000:.0f} ms, "
        f"{reply.ending}]"
    )
