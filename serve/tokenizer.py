"""The tokenizer of a model directory without transformers: ``tokenizer.json`` and its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer

from secateur.errors import ModelError
from secateur.serve.chat_template import ChatTemplate

# Names of special tokens that models have; others end in "_token" too.
_SETTINGS = ("add_bos_token", "add_eos_token")
_FIX = "copy tokenizer.json and tokenizer_config.json from the original model"


class JsonTokenizer:
    """Token ids, special tokens and chats as transformers' tokenizer of the same files has them.

    What transformers reads is read: special tokens from ``tokenizer_config.json`` (older models:
    ``special_tokens_map.json``), tokens that are named there and missing in ``tokenizer.json`` are
    added, a chat template in a file of its own comes before one in the settings.

    Args:
        directory: the model directory.

    Attributes:
        all_special_ids: ids of the named special tokens.
        eos_token_id: the end-of-sequence token, if one is named.
        chat_template: how a conversation is written, if the model says so.

    Raises:
        ModelError: a file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory)
        settings = self._settings()
        self.backend_tokenizer = self._backend()
        named = dict(_named_tokens(settings))
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
        others = [_content(token) for token in extra] if isinstance(extra, list) else []
        self._add(settings.get("added_tokens_decoder"), [*named.values(), *others])
        ids = (self.backend_tokenizer.token_to_id(name) for name in (*named.values(), *others))
        self.all_special_ids = [token for token in ids if token is not None]
        eos = named.get("eos_token")
        self.eos_token_id = None if eos is None else self.backend_tokenizer.token_to_id(eos)
        source = self._template(settings.get("chat_template"))
        try:
            self.chat_template = None if source is None else ChatTemplate(source, named)
        except jinja2.TemplateError as fault:
            raise ModelError(
                f"the chat template of {self._path} is damaged: {fault}", _FIX
            ) from fault

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """The tokens besides the vocabulary of the pieces, by id."""
        added: Mapping[int, AddedToken] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        ids: list[int] = self.backend_tokenizer.encode(
            text, add_special_tokens=add_special_tokens
        ).ids
        return ids

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """The piece with this id; None where the vocabulary has a gap."""
        piece: str | None = self.backend_tokenizer.id_to_token(token)
        return piece

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: object) -> str:
        """A conversation as text; see `ChatTemplate.render`."""
        assert self.chat_template is not None
        return self.chat_template.render(messages)

    def _settings(self) -> dict[str, Any]:
        settings = self._json("tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            settings |= self._json("special_tokens_map.json")
        return settings

    def _json(self, name: str) -> dict[str, Any]:
        path = self._path / name
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as fault:
            raise ModelError(f"{path} is not JSON: {fault}", _FIX) from fault
        if not isinstance(content, dict):
            raise ModelError(f"{path} holds no JSON object", _FIX)
        return content

    def _backend(self) -> Tokenizer:
        path = self._path / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{self._path} has no tokenizer.json", _FIX)
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as fault:  # tokenizers raises nothing more precise
            raise ModelError(f"{path} is no tokenizer: {fault}", _FIX) from fault
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _add(self, decoder: object, specials: Sequence[str]) -> None:
        """Add tokens that the settings know better than ``tokenizer.json``, or alone."""
        known = {repr(token) for token in self.added_tokens_decoder.values()}
        wanted = []
        if isinstance(decoder, dict):
            listed = (_token(decoder[place]) for place in sorted(decoder, key=int))
            wanted = [token for token in listed if repr(token) not in known]
        there = {token.content for token in (*self.added_tokens_decoder.values(), *wanted)}
        for name in dict.fromkeys(specials):
            if name not in there:
                wanted.append(AddedToken(name, special=True))
        self.backend_tokenizer.add_tokens(
            [_special(token) if token.content in specials else token for token in wanted]
        )

    def _template(self, setting: object) -> str | None:
        """The source of the default template."""
        path = self._path / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        if isinstance(setting, list):  # several, by name
            setting = {entry["name"]: entry["template"] for entry in setting}
        if isinstance(setting, dict):
            setting = setting.get("default")
        return setting if isinstance(setting, str) else None


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The special tokens that have a role, e.g. ("bos_token", "<s>")."""
    for key, value in settings.items():
        if key.endswith("_token") and key not in _SETTINGS and isinstance(value, str | dict):
            yield key, _content(value)
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        for key, value in extra.items():
            yield key, _content(value)


def _content(token: object) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{key: value for key, value in entry.items() if key != "__type"})


def _special(token: AddedToken) -> AddedToken:
    token.special = True
    return token
