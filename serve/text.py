"""Between token ids and text: encoding, streaming decoding, stop strings.

Decoding goes through the bytes of each token, not through repeated calls of the tokenizer, so that
a character spread over several tokens appears when it is complete and never as U+FFFD before.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Which character stands for which byte in a byte-level BPE vocabulary (GPT-2's convention)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class Tokenizer(Protocol):
    """What a codec needs of a tokenizer: a part of what those of transformers have."""

    chat_template: Any
    eos_token_id: Any

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the named special tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens besides the vocabulary of the pieces, by id."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""

    def convert_ids_to_tokens(self, token: int) -> Any:
        """The piece with this id; None where the vocabulary has a gap."""

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """A conversation as text."""


class TextCodec:
    """A tokenizer that knows the bytes of every token; safe to use from several threads.

    Args:
        tokenizer: byte-level or sentencepiece-like.

    Attributes:
        tokenizer: as given.
        special: ids of the special tokens: they have no text in an answer.
        eos_token_id: the tokenizer's end-of-sequence token, if it has one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {
            token for token, entry in added.items() if entry.special
        }
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self._alphabet = _byte_alphabet() if byte_level else {}
        self._bytes = {token: str(entry).encode() for token, entry in added.items()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` adds what the model expects around it (BOS)."""
        return self.tokenizer.encode(text, add_special_tokens=special)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(self.tokenizer.chat_template)

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation as the model's chat template writes it, up to the assistant's turn."""
        rendered: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return rendered

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token: of a special token its name, of an unused id none."""
        raw = self._bytes.get(token)
        if raw is None:
            raw = self._bytes[token] = self._piece_bytes(token)
        return raw

    def _piece_bytes(self, token: int) -> bytes:
        piece: str = self.tokenizer.convert_ids_to_tokens(token) or ""
        if self._alphabet and all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        return piece.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        r"""One token for display; ``bytes:\xe2\x80`` if it is not whole characters."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, tokens: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of some tokens; bytes that form no character become U+FFFD."""
        stream = TokenStream(self, keep_special=keep_special)
        return "".join(map(stream.feed, tokens)) + stream.end()


class TokenStream:
    """Decodes one sequence token by token.

    Args:
        codec: knows the bytes of the tokens.
        keep_special: write special tokens by name instead of leaving them out.
    """

    def __init__(self, codec: TextCodec, *, keep_special: bool = False) -> None:
        self._codec = codec
        self._hidden = frozenset() if keep_special else codec.special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes; maybe none."""
        if token in self._hidden:
            return ""
        return self._decoder.decode(self._codec.token_bytes(token))

    def end(self) -> str:
        """What is left: U+FFFD if the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a text at the first stop string and lets no part of one through before.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be sent now, and whether a stop string was found after it."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        return self._release(self._possible_start()), False

    def end(self) -> str:
        """What was held back, now that no stop string can follow."""
        return self._release(len(self._held))

    def _release(self, upto: int) -> str:
        free, self._held = self._held[:upto], self._held[upto:]
        return free

    def _possible_start(self) -> int:
        """Where the earliest unfinished stop string begins."""
        longest = max(map(len, self._stops))
        for at in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[at:]) for stop in self._stops):
                return at
        return len(self._held)
