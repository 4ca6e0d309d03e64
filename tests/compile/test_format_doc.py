"""The reader printed in docs/format.md reads what pack_model writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from secateur.artifact import LayerFacts, Manifest
from secateur.compile import pack_model, read_packed
from secateur.compile.config import PackedConfig
from tests.compile.conftest import prune_by_hand

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def printed_reader() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 33
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["read"]


@pytest.mark.parametrize(
    ("pattern", "values"), [("2:4", "fp32"), ("37.5%", "fp16"), ("50%@16x1", "fp32")]
)
def test_the_printed_reader(tmp_path: Path, pattern: str, values: Any) -> None:
    source = prune_by_hand(tmp_path / "pruned", pattern)
    pack_model(source, tmp_path / "packed", values=values)
    read = printed_reader()(tmp_path / "packed")
    dense = load_file(source / "model.safetensors")
    assert read.keys() == dense.keys()
    for name, weight in dense.items():
        wanted = weight.astype(np.float16) if values == "fp16" else weight
        assert read[name].dtype == wanted.dtype
        assert np.array_equal(read[name], wanted), name


@pytest.mark.parametrize(
    ("pattern", "values", "size"),
    [
        *(("2:4", "int8", 32), ("37.5%", "int4", 64), ("50%@16x1", "int4", 32)),
        *(("50%", "int8", 128), ("2:4", "fp8", 64), ("62.5%@4x1", "fp8", 64)),
    ],
)
def test_the_printed_reader_of_integers(
    tmp_path: Path, pattern: str, values: Any, size: int
) -> None:
    source = prune_by_hand(tmp_path / "pruned", pattern, hidden=48, inner=80, dense=("v_proj",))
    pack_model(
        source, tmp_path / "packed", values=values, group_size=size, quantize="rtn", quiet=True
    )
    read, packed = printed_reader()(tmp_path / "packed"), read_packed(tmp_path / "packed")
    assert sorted(read) == packed.names()
    for name in packed.names():
        wanted = packed.load(name).numpy()
        assert read[name].dtype == wanted.dtype
        assert np.array_equal(read[name], wanted), name


def test_every_quantize_fact_is_described(tmp_path: Path) -> None:
    pack_model(prune_by_hand(tmp_path / "a"), tmp_path / "b", values="int8", quantize="rtn")
    for layer in Manifest.read(tmp_path / "b").layers.values():
        for key in layer.steps["quantize"]:
            assert f"| `{key}` |" in TEXT


def test_the_printed_config_is_valid() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    config = PackedConfig.parse(json.loads(f"{{{text}}}")["quantization_config"], "docs")
    (layer,) = config.layers.values()
    assert layer.values_shape == (576, 288)


@pytest.mark.parametrize("model", [Manifest, LayerFacts])
def test_every_manifest_key_is_described(model: Any) -> None:
    for name, field in model.model_fields.items():
        assert f"`{field.alias or name}`" in TEXT
