"""Between token ids and text: encoding, streaming decoding, stop strings.

Decoding goes through the bytes of each token, not through repeated calls of the tokenizer, so that
a character spread over several tokens appears when it is complete and never as U+FFFD before.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Which character stands for which byte in a byte-level BPE vocabulary (GPT-2's convention)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class TextCodec:
    """A tokenizer with the bytes of every token at hand; safe to use from several threads.

    Args:
        tokenizer: a transformers tokenizer, byte-level or sentencepiece-like.

    Attributes:
        special: ids of the special tokens: they have no text in an answer.
        eos_token_id: the tokenizer's end-of-sequence token, if it has one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.special: frozenset[int] = frozenset(tokenizer.all_special_ids)
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._bytes = _bytes_of_tokens(tokenizer)
        self.special |= {
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` adds what the model expects around it (BOS)."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(self._tokenizer.chat_template)

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation as the model's chat template writes it, up to the assistant's turn."""
        rendered: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return rendered

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; of a special token its name."""
        return self._bytes[token] if token < len(self._bytes) else b""

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


def _bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    alphabet = _byte_alphabet() if byte_level else {}
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    table = []
    for token, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token in added:
            table.append(added[token].encode())
        elif piece is None:  # a gap in the vocabulary
            table.append(b"")
        elif byte_level and all(letter in alphabet for letter in piece):
            table.append(bytes(alphabet[letter] for letter in piece))
        elif match := _BYTE_TOKEN.fullmatch(piece):
            table.append(bytes.fromhex(match[1]))
        else:
            table.append(piece.replace("\u2581", " ").encode())
    return table


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
