"""Where text and images come from, and how they are cut and drawn."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.calibration import (
    calibration_inputs,
    conversation_start,
    draw_windows,
    read_text,
    self_generated,
    token_ids,
)
from secateur.checkpoint import Checkpoint
from secateur.errors import EnvironmentFault, ModelError, SecateurError
from secateur.model import StreamedModel, load_causal_lm, load_tokenizer
from secateur.prune import prune_model
from secateur.recipe import Calibration, Prune


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
    starts = [[0], [5, 7, 9]]
    done: list[tuple[int, int]] = []
    tokens = self_generated(
        model, starts, samples=5, length=20, seed=1, tick=lambda *at: done.append(at)
    )
    assert tokens.shape == (5, 20)
    assert done == sorted(done)
    assert done[-1] == (100, 100)
    again = self_generated(model, starts, samples=5, length=20, seed=1)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, self_generated(model, starts, samples=5, length=20, seed=2))
    # Replay the draw without a cache, from whole prefixes.
    generator = torch.Generator().manual_seed(1)
    for own, start in zip(tokens.split([3, 2]), starts, strict=True):
        assert (own[:, : len(start)] == torch.tensor(start)).all()
        for position in range(len(start), 20):
            with torch.no_grad():
                logits = model(own[:, :position]).logits[:, -1]
            drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
            assert torch.equal(drawn, own[:, position])


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(path), torch.device("cpu"), None)


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "start"),
    [
        (TEMPLATE, "<user>"),
        ("<system>be kind<end>" + TEMPLATE, "<system>be kind<end><user>"),
        (None, ""),
        ("{{ raise_exception('a system message comes first') }}", ""),
        ("{{ messages | length }}", ""),
    ],
)
def test_half_of_a_chat_models_own_text_is_conversations(
    tiny: Path, tmp_path: Path, template: str | None, start: str
) -> None:
    path = tmp_path / "chat"
    shutil.copytree(tiny, path)
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(path))
    ids = token_ids(tokenizer, start).tolist()
    assert conversation_start(path) == ids
    calibration = Calibration(samples=5, length=4 * len(ids) + 8)
    own = calibration_inputs(streamed(path), calibration)["input_ids"]
    rows = [row[: len(ids)].tolist() == ids for row in own]
    assert rows == ([True] * 5 if not ids else [False] * 3 + [True] * 2)
    if ids:  # no room for an answer
        short = Calibration(samples=4, length=2 * len(ids) - 1)
        own = calibration_inputs(streamed(path), short)["input_ids"]
        assert (own[:, 0] == own[0, 0]).all()


def test_a_model_without_a_tokenizer_writes_its_own_text(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare"
    shutil.copytree(tiny, path, ignore=shutil.ignore_patterns("tokenizer*"))
    assert conversation_start(path) == []
    inputs = calibration_inputs(streamed(path), Calibration(samples=2, length=8))
    assert inputs["input_ids"].shape == (2, 8)


CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A tiny ViT with named classes and a processor; tests must not change it."""
    import transformers

    path = tmp_path_factory.mktemp("classifier") / "vit"
    names = {
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {n: i for i, n in enumerate(CLASSES)},
    }
    make_model(path, "vit", **names)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of images of coloured tiles: a file of each given name."""
    from PIL import Image

    def make(*names: str, mode: str = "RGB") -> Path:
        for number, name in enumerate(names):
            generator = torch.Generator().manual_seed(number)
            tiles = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            pixels = tiles.repeat_interleave(10, dim=0).repeat_interleave(12, dim=1)
            file = tmp_path / "images" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).convert(mode).save(file)
        return tmp_path / "images"

    return make


def drawn(
    classifier: Path, data: Path | str, samples: int = 99, seed: int = 0
) -> dict[str, torch.Tensor]:
    model = StreamedModel(Checkpoint(classifier), torch.device("cpu"), torch.float32)
    return calibration_inputs(model, Calibration(data=str(data), samples=samples, seed=seed))


def processed(classifier: Path, file: Path) -> torch.Tensor:
    """What the model's own processor makes of one image."""
    import transformers
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(classifier)
    return processor(images=Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]


def seen_in(classifier: Path, pixels: torch.Tensor) -> list[int]:
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        return model(pixel_values=pixels).logits.argmax(-1).tolist()


def files_of(inputs: dict[str, torch.Tensor], classifier: Path, folder: Path) -> list[Path]:
    """Which file each of the samples was."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    known = [processed(classifier, file)[0] for file in files]
    return [
        next(f for f, pixels in zip(files, known, strict=True) if torch.equal(pixels, row))
        for row in inputs["pixel_values"]
    ]


def test_images_in_folders_of_classes_have_their_labels(
    classifier: Path, folder: Callable[..., Path]
) -> None:
    images = folder("dog/1.png", "bee/1.PNG", "dog/2.bmp", "deep/down/eel/3.webp", "dog/4.png")
    inputs = drawn(classifier, images)
    assert inputs["pixel_values"].shape == (5, 3, 32, 32)
    names = [file.parent.name for file in files_of(inputs, classifier, images)]
    assert [CLASSES[label] for label in inputs["labels"]] == names
    assert sorted(names) == ["bee", "dog", "dog", "dog", "eel"]


@pytest.mark.parametrize("other", ["stray.png", "fox/1.png"])
def test_else_the_label_is_what_the_model_sees(
    other: str, classifier: Path, folder: Callable[..., Path]
) -> None:
    """One image that is in no class's folder, and none of them is believed."""
    images = folder(*(f"dog/{number}.png" for number in range(6)), other)
    inputs = drawn(classifier, images)
    assert inputs["labels"].tolist() == seen_in(classifier, inputs["pixel_values"])
    assert len(set(inputs["labels"].tolist())) > 1


def test_images_are_drawn_without_repetition_by_the_seed(
    classifier: Path, folder: Callable[..., Path]
) -> None:
    images = folder(*(f"{number}.png" for number in range(8)))
    (images / "readme.txt").write_text("no image")
    first, again, other = (drawn(classifier, images, 5, seed) for seed in (3, 3, 4))
    (images / "readme.txt").unlink()
    for name in ("pixel_values", "labels"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    chosen = files_of(first, classifier, images)
    assert len(set(chosen)) == 5
    everything = drawn(classifier, images, 8)
    assert len(set(files_of(everything, classifier, images))) == 8


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_colours(mode: str, classifier: Path, folder: Callable[..., Path]) -> None:
    images = folder("ant/1.png", mode=mode)
    pixels = drawn(classifier, images)["pixel_values"]
    assert torch.equal(pixels, processed(classifier, images / "ant" / "1.png"))


def test_no_images(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for data in (tmp_path, tmp_path / "nowhere", "self", "pydoc", tmp_path / "notes.txt"):
        with pytest.raises(ModelError, match="is no folder of images") as refusal:
            drawn(classifier, data)
        assert "--data DIR" in refusal.value.fix


def test_damaged_images_and_a_missing_processor(
    classifier: Path, folder: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    images = folder("1.png")
    with pytest.raises(ModelError, match="cannot be prepared") as refusal:
        drawn(make_model(tmp_path / "bare", "vit"), images)
    assert "preprocessor_config.json" in refusal.value.fix
    whole = (images / "1.png").read_bytes()
    (images / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be prepared"):
        drawn(classifier, images)
    (images / "2.png").write_bytes(b"no image at all")
    with pytest.raises(ModelError, match=r"cannot be prepared: .*2\.png"):
        drawn(classifier, images)


def test_pillow_is_optional(
    classifier: Path, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = folder("1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(EnvironmentFault, match="needs Pillow") as refusal:
        drawn(classifier, images)
    assert "secateur[images]" in refusal.value.fix


@pytest.mark.parametrize("labelled", [False, True])
def test_a_classifier_is_pruned_on_images(
    labelled: bool, classifier: Path, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Labels reach the methods that read a loss: with others, other weights go."""
    images = folder("ant/1.png", "bee/1.png", "cat/1.png")
    masks: list[Any] = []
    for number, renamed in enumerate(("ant", "fox")):
        (images / "ant").rename(images / renamed) if renamed != "ant" else None
        prune = Prune(method="gblm" if labelled else "wanda", device="cpu")
        data = Calibration(data=str(images), samples=4)
        out = tmp_path / f"out-{number}"
        result = prune_model(str(classifier), out, prune, data, quiet=True)
        assert result.manifest.notes == ["3 calibration samples: there were no more"]
        masks.append((out / "masks.safetensors").read_bytes())
    assert (masks[0] != masks[1]) == labelled
