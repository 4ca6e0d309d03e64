"""What a serving benchmark asks: random tokens, or texts from a file.

A server may keep what it computed for a prompt. So no prompt is used twice: a new measuring point
draws or reads on, and only when a file has ended does it begin again, which `Prompts.again` tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import ModelError, UsageError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to send.

    Attributes:
        text: the text.
        tokens: how many it has; 0 if nobody knows.
        new_tokens: the longest answer to ask for.
    """

    text: str
    tokens: int
    new_tokens: int


class Prompts:
    """An endless supply.

    Args:
        data: "random", or a file: see `_read`.
        tokenizer: of the served model; None if there is none at hand.
        length: tokens of a random prompt.
        new_tokens: tokens of an answer; None: as many as the answer in the file has.
        seed: draws random prompts.

    Attributes:
        again: how often a file was begun anew.

    Raises:
        UsageError: random prompts or lengths of answers are wanted without a tokenizer.
        ModelError: the file is missing or is none of these.
    """

    def __init__(
        self,
        data: str = "random",
        *,
        tokenizer: Any = None,
        length: int = 128,
        new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.again = 0
        if data == "random":
            if tokenizer is None:
                raise UsageError(
                    "random prompts are drawn from the vocabulary of a tokenizer, and none is here",
                    "name the model's directory with --tokenizer, or give a file with --data",
                )
            self._supply = _random(tokenizer, length, new_tokens or 1, seed)
        else:
            self._supply = self._cycle(_read(Path(data), tokenizer, new_tokens))

    def take(self, wanted: int) -> list[Prompt]:
        """The next prompts."""
        return list(islice(self._supply, wanted))

    def _cycle(self, prompts: list[Prompt]) -> Iterator[Prompt]:
        while True:
            yield from prompts
            self.again += 1


def _random(tokenizer: Any, length: int, new_tokens: int, seed: int) -> Iterator[Prompt]:
    """Texts that are `length` tokens for the server, or nearly.

    Random tokens, decoded, rarely encode to as many; so they are cut and filled up until they do,
    some times at most. What a server puts before a text (BOS) is taken into account.
    """
    special = set(tokenizer.all_special_ids)
    # Others may be parts of characters, which do not come back from text as they were.
    plain = (n for word, n in tokenizer.get_vocab().items() if word.lstrip("Ġ▁").isascii())
    known = np.array(sorted(set(plain) - special))
    own = max(1, length - len(tokenizer("")["input_ids"]))
    for number in count():
        draw = np.random.default_rng((seed, number))
        ids: list[int] = []
        for _ in range(10):
            ids = [*ids[:own], *draw.choice(known, max(0, own - len(ids))).tolist()]
            text = tokenizer.decode(ids)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == own:
                break
        yield Prompt(text, len(ids) + length - own, new_tokens)


def _read(path: Path, tokenizer: Any, new_tokens: int | None) -> list[Prompt]:
    """The prompts of a file.

    .txt    a prompt a line
    .jsonl  an object a line with the key "prompt", and perhaps "completion"
    .json   ShareGPT: a list of {"conversations": [{"value": …}, …]}; the first value asks, the
            second answers. As `vllm bench serve` does, only pairs of 4 … 1024 and 4 … tokens are
            taken, 2048 together at most, where a tokenizer can tell.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise ModelError(
            f"the prompts {path} cannot be read: {fault.strerror}",
            "give random, or a .txt, .jsonl or ShareGPT .json file",
        ) from fault
    try:
        pairs = list(_pairs(path.suffix, text))
    except (ValueError, LookupError, TypeError) as fault:
        raise ModelError(
            f"{path} does not hold prompts: {type(fault).__name__}: {fault}",
            'a line of .jsonl is {"prompt": …}; a .json is ShareGPT\'s list of conversations',
        ) from fault
    if new_tokens is None and (tokenizer is None or any(answer is None for _, answer in pairs)):
        raise UsageError(
            f"how long the answers to {path} shall be is not known",
            "give --new-tokens" + (" or --tokenizer" if tokenizer is None else ""),
        )

    def length(text: str | None) -> int:
        return len(tokenizer(text)["input_ids"]) if text and tokenizer is not None else 0

    prompts = [
        Prompt(asked, length(asked), new_tokens or max(1, length(reply))) for asked, reply in pairs
    ]
    if path.suffix == ".json" and tokenizer is not None:
        prompts = [one for one in prompts if _usual(one)]
    if not prompts:
        raise ModelError(f"{path} holds no usable prompt", "give another file")
    return prompts


def _usual(prompt: Prompt) -> bool:
    whole = prompt.tokens + prompt.new_tokens
    return min(prompt.tokens, prompt.new_tokens) >= 4 and prompt.tokens <= 1024 and whole <= 2048


def _pairs(suffix: str, text: str) -> Iterator[tuple[str, str | None]]:
    if suffix == ".json":
        for entry in json.loads(text):
            turns = entry.get("conversations") or entry["conversation"]
            if len(turns) >= 2:
                yield turns[0]["value"], turns[1]["value"]
        return
    for line in filter(str.strip, text.split("\n")):
        if suffix == ".jsonl":
            entry = json.loads(line)
            yield entry["prompt"], entry.get("completion")
        else:
            yield line, None
