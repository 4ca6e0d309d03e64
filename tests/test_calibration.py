"""Where text comes from and how it is cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from secateur.calibration import draw_windows, read_text, self_generated, token_ids
from secateur.errors import EnvironmentFault, ModelError, SecateurError
from secateur.model import load_causal_lm, load_tokenizer


def test_files(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("héllo")
    assert read_text(str(text)) == "héllo"
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n\n{"content": "two"}\n')
    assert read_text(str(lines)) == "one\n\ntwo"


def test_pydoc_is_prose_on_every_machine() -> None:
    assert len(read_text("pydoc")) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"{", "line 1"),
        ("b.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2"),
        ("c.jsonl", b"[1]", "line 1"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as refusal:
        read_text(str(path))
    assert refusal.value.fix


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3))
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert read_text(str(folder)) == "row 0\n\nrow 1\n\nrow 2"
    (folder / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ModelError, match="no column 'text'"):
        read_text(str(folder))
    with pytest.raises(SecateurError) as refusal:  # no such set, or no network to ask
        read_text("secateur-tests/no-such-data-set")
    assert refusal.value.fix


def test_datasets_library_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"`datasets` library"):
        read_text("c4")


def test_windows_follow_the_papers_draw() -> None:
    ids = torch.arange(1000)
    windows = draw_windows(ids, samples=5, length=30, seed=7)
    dice = random.Random(7)
    for window in windows:
        start = dice.randint(0, 1000 - 30 - 1)
        assert window.tolist() == list(range(start, start + 30))
    assert torch.equal(windows, draw_windows(ids, 5, 30, 7))
    assert not torch.equal(windows, draw_windows(ids, 5, 30, 8))


def test_short_texts_shorten_the_windows() -> None:
    assert draw_windows(torch.arange(10), samples=3, length=30, seed=0).shape == (3, 10)
    with pytest.raises(ModelError, match="1 tokens"):
        draw_windows(torch.arange(1), samples=3, length=30, seed=0)


def test_token_ids_hold_no_special_tokens(tiny: Path) -> None:
    assert token_ids(load_tokenizer(tiny), "ab").tolist() == [
        load_tokenizer(tiny).convert_tokens_to_ids(letter) for letter in "ab"
    ]


def test_self_generated_text_follows_the_model(tiny: Path) -> None:
    """Each token is drawn from the model's own distribution over what came before."""
    model = load_causal_lm(tiny)
    done: list[tuple[int, int]] = []
    tokens = self_generated(
        model, 0, samples=3, length=20, seed=1, tick=lambda *at: done.append(at)
    )
    assert tokens.shape == (3, 20)
    assert (tokens[:, 0] == 0).all()
    assert done[-1] == (60, 60)
    again = self_generated(model, 0, samples=3, length=20, seed=1)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, self_generated(model, 0, samples=3, length=20, seed=2))
    # Replay the draw without a cache, from whole prefixes.
    generator = torch.Generator().manual_seed(1)
    for position in range(1, 20):
        with torch.no_grad():
            logits = model(tokens[:, :position]).logits[:, -1]
        drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
        assert torch.equal(drawn, tokens[:, position])
