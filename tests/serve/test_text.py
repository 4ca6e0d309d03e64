"""Streaming decoding and stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.serve.text import StopStrings, TextCodec, TokenStream


@pytest.fixture(scope="module")
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_any_text_round_trips(codec: TextCodec, text: str) -> None:
    assert codec.decode(codec.encode(text), keep_special=True) == text


@given(st.lists(st.integers(0, 299), max_size=30))
def test_a_stream_adds_up_to_what_the_tokenizer_decodes(
    codec: TextCodec, tokenizer: Any, ids: list[int]
) -> None:
    assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet="aé€😀你", max_size=20))
def test_no_character_appears_before_it_is_complete(codec: TextCodec, text: str) -> None:
    stream = TokenStream(codec)
    sent = ""
    for token in codec.encode(text):
        sent += stream.feed(token)
        assert text.startswith(sent)
    assert sent == text
    assert stream.end() == ""


def test_an_incomplete_character_at_the_end(codec: TextCodec) -> None:
    assert codec.decode(codec.encode("😀")[:-1]) == "\ufffd"


def test_special_tokens(codec: TextCodec) -> None:
    ids = codec.encode("a<|im_end|>b")
    assert codec.decode(ids) == "ab"
    assert codec.decode(ids, keep_special=True) == "a<|im_end|>b"
    assert codec.token_text(2) == "<|im_end|>"
    assert codec.token_text(codec.encode("😀")[0]).startswith("bytes:\\xf0")
    assert codec.token_bytes(10**6) == b""


def test_sentencepiece_like_vocabularies() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    raw = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert not codec.has_chat_template
    assert codec.eos_token_id is None
    text = "a a 😀é a"
    assert codec.decode(codec.encode(text)) == text


stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(stop_lists, st.lists(st.text(alphabet="abc", max_size=3), max_size=12))
def test_stop_strings(stops: list[str], pieces: list[str]) -> None:
    cut, sent, text, stopped = StopStrings(stops), "", "", False
    for piece in pieces:
        text += piece
        free, stopped = cut.feed(piece)
        sent += free
        if stopped:
            break
        assert not any(stop in text for stop in stops)
        # Nothing sent can turn out to be the beginning of a stop string.
        begun = [at for at in range(len(text)) if any(s.startswith(text[at:]) for s in stops)]
        assert sent == text[: min(begun, default=len(text))]
    if stopped:
        assert sent == text[: min(text.find(stop) for stop in stops if stop in text)]
    else:
        assert sent + cut.end() == text
