"""An orphaned checkpoint, packed, computes in both engines what its dense weights do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from secateur.compile import pack_model, write_dense
from secateur.compile.config import LIMITS
from secateur.errors import ModelError
from secateur.model import load_causal_lm
from secateur.serve import load
from secateur.serve.native.model import NativeModel
from tests.compile.orphans import FORMS, write_orphan
from tests.serve.native.stepping import Array, random_steps, random_texts, reference


@pytest.mark.parametrize("name", FORMS)
def test_both_engines(name: str, tmp_path: Path) -> None:
    orphan = write_orphan(tmp_path, name)
    report = pack_model(orphan, tmp_path / "packed")
    integers = report.values in LIMITS
    write_dense(orphan, tmp_path / "dense", values="fp32" if integers else None)
    texts = random_texts(np.random.default_rng(5), 64, [30, 9])
    right = np.concatenate(reference(tmp_path / "dense", texts))
    most = 1e-3 if name == "24-fp8" else 2e-6
    assert lost(through_transformers(tmp_path / "packed", texts, integers), right) < most
    with NativeModel.open(
        tmp_path / "packed",
        activations="fp32" if integers else None,
        kv_type="fp32",
        head="fp32",
    ) as model:
        steps = random_steps(model, texts, np.random.default_rng(1))
        # To fp16: what a layout leaves over, or fp8 times scales that are no powers of two.
        said = " ".join(map(str, model.report))
        assert ("rounded once" in said) == (name == "24-fp8")
        rounds = "+rest" in said or name == "24-fp8"
        assert lost(np.concatenate(steps), right) < (1e-3 if rounds else 2e-6)


def through_transformers(directory: Path, texts: list[list[int]], integers: bool) -> Array:
    config = transformers.AutoConfig.from_pretrained(directory)
    if integers:
        config.quantization_config["activations"] = "fp32"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = [model(torch.tensor([text])).logits[0].float().numpy() for text in texts]
    return np.concatenate(found)


def lost(found: Array, right: Array) -> float:
    return float(np.sqrt(np.square(found - right).mean() / np.square(right).mean()))


@pytest.mark.parametrize("name", ["24-fp8", "marlin-int4"])
def test_an_orphan_itself_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    orphan = write_orphan(tmp_path, name)
    for opened in (
        lambda: load(orphan),
        lambda: load(orphan, engine="native"),
        lambda: load(orphan, engine="transformers"),
        lambda: load_causal_lm(orphan),
    ):
        with pytest.raises(ModelError, match="which no engine reads as it is") as told:
            opened()
        command = f"secateur compile {orphan} -o {orphan}-packed --format packed"
        assert command in told.value.fix
