"""Checkpoints: lazy reading, and every kind of damage refused by name."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.checkpoint import (
    Checkpoint,
    TensorWriter,
    merge_tensors,
    save_tensors,
    write_index,
)
from secateur.errors import ModelError

WRITTEN = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64]
WRITTEN += [torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_reads_what_safetensors_wrote(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    whole = load_file(tiny / "model.safetensors")
    assert checkpoint.names() == sorted(whole)
    for name, tensor in whole.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.nbytes(name) == tensor.nbytes
        assert checkpoint.dtype(name) == "F32"
        assert torch.equal(checkpoint.load(name), tensor)
    assert {"tokenizer.json", "generation_config.json"} <= {f.name for f in checkpoint.companions()}


def test_what_is_read_may_be_changed(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    first = checkpoint.load("model.norm.weight")
    before = first.clone()
    first.mul_(0)
    assert torch.equal(checkpoint.load("model.norm.weight"), before)


def test_reads_shards(tiny: Path, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    sharded = make_model(tmp_path / "sharded", shards="20KB")
    checkpoint = Checkpoint(sharded)
    assert len(checkpoint.files) > 2
    for name in Checkpoint(tiny).names():
        assert torch.equal(checkpoint.load(name), Checkpoint(tiny).load(name))


def test_missing_things(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no tensor 'x'"):
        Checkpoint(copy).load("x")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        Checkpoint(copy)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_broken_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json is not"):
        Checkpoint(copy)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(copy: Path, keep: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"truncated|broken header"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)
def test_broken_headers(copy: Path, header: bytes) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(ModelError, match=r"truncated|broken header"):
        Checkpoint(copy)


def test_index_may_not_point_outside(copy: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the model directory"):
        Checkpoint(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no 'weight_map'"):
        Checkpoint(copy)


def test_merge_equals_one_file(tmp_path: Path) -> None:
    parts = [
        {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8)},
        {},
        {"c": torch.randn(2).bfloat16(), "d": torch.zeros(0, 4)},
    ]
    files = []
    for number, part in enumerate(parts):
        save_tensors(tmp_path / f"{number}.safetensors", part)
        files.append(tmp_path / f"{number}.safetensors")
    merge_tensors(tmp_path / "all.safetensors", files)
    merged = load_file(tmp_path / "all.safetensors")
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor)


def test_index_names_every_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "2.safetensors")
    write_index(tmp_path, [tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "1.safetensors", "b": "2.safetensors"}
    assert index["metadata"]["total_size"] == 20


@given(
    tensors=st.dictionaries(
        st.text("ab.", min_size=1),
        st.tuples(st.sampled_from(WRITTEN), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_tensors_written_one_by_one(tensors: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, right = Path(folder, "model.safetensors"), {}
        with TensorWriter(path) as writer:
            for seed, (name, (dtype, shape)) in enumerate(tensors.items()):
                made = torch.Generator().manual_seed(seed)
                right[name] = torch.randn(shape, generator=made).mul(40).to(dtype)
                writer.add(name, right[name])
        assert [file.name for file in Path(folder).iterdir()] == [path.name]
        other = Path(folder, "other.safetensors")
        save_file(right, other, metadata={"format": "pt"})
        assert path.read_bytes() == other.read_bytes()


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TensorWriter(tmp_path / "model.safetensors") as writer:  # noqa: PT012
        writer.add("a", torch.ones(3))
        writer.add("b", torch.ones(3, dtype=torch.int8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
