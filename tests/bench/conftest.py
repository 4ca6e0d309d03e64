"""What the bench tests measure: a tiny Llama, the same with half of its weights gone, a text."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def dense(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench") / "dense", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(dense, tmp_path_factory.mktemp("bench") / "sparse")
    model = AutoModelForCausalLM.from_pretrained(dense)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.rand_like(module.weight) >= 0.5
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 201 tokens, each a byte."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(draw.choice("abcdefgh .") for _ in range(201)))
    return path
