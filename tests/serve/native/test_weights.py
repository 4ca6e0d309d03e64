"""Damaged files are refused with the name of the tensor; memory holds the packed form alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from secateur.compile import write_dense
from secateur.compile.nearest import pack_nibbles, round_to_nearest
from secateur.compile.quantize import rtn
from secateur.compile.stored import unpack_nibbles
from secateur.errors import ModelError, UsageError
from secateur.serve.native.model import NativeModel
from tests.compile.conftest import rewrite
from tests.serve.native.stepping import random_steps, random_texts, reference, save_random

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj"


def replaced(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        if (result := change(tensors[name])) is not None:
            tensors[name] = result

    return apply


def first_set_to(value: Any) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor.view(-1)[0] = value

    return change


DAMAGE: list[tuple[str, str, str, Callable[[torch.Tensor], Any], str]] = [
    ("fp32", "model.safetensors", f"{DOWN}.weight_bitmask", first_set_to(7), "bits are set for"),
    ("fp32", "model.safetensors", f"{DOWN}.weight_bitmask", lambda x: x.flip(1)[:, :-1], "shape"),
    ("fp32", "model.safetensors", f"{DOWN}.weight_values", first_set_to(torch.nan), "holds NaN"),
    ("fp32", "model.safetensors", f"{DOWN}.weight_values", lambda x: x.half(), "type F16, not F32"),
    ("int8", "model.safetensors", f"{DOWN}.weight_values", first_set_to(-128), "-128, below -127"),
    ("int4", "model.safetensors", f"{DOWN}.weight_values", first_set_to(0x88), "-8, below -7"),
    ("int8", "model.safetensors", f"{DOWN}.weight_scales", first_set_to(-1), "negative"),
    ("int8", "model.safetensors", f"{DOWN}.weight_scales", first_set_to(torch.inf), "not finite"),
    ("fp8", "model.safetensors", f"{DOWN}.weight_values", first_set_to(255), "value 0 is NaN"),
    ("fp8", "model.safetensors", f"{DOWN}.weight_scales", first_set_to(-1), "negative"),
    ("int8", "model.safetensors", "model.norm.weight", first_set_to(torch.nan), "holds NaN"),
    ("int8", "model.safetensors", "model.norm.weight", lambda x: x[1:].clone(), "has shape"),
    ("int8", "model.safetensors", "lm_head.weight", first_set_to(torch.inf), "holds NaN or inf"),
    ("int8", "model.safetensors", "lm_head.weight", lambda x: x.long(), "is of type I64"),
    ("pruned", "model.safetensors", f"{DOWN}.weight", lambda x: x + 1, "is not 0 where"),
    ("pruned", "model.safetensors", f"{DOWN}.weight", lambda x: x.t().contiguous(), "has shape"),
    ("pruned", "masks.safetensors", f"{DOWN}.weight", first_set_to(7), "2:4: row 0 keeps 3"),
    ("pruned", "masks.safetensors", f"{DOWN}.weight", lambda x: x[1:].clone(), "rows of bits"),
]


@pytest.mark.parametrize(("kind", "file", "tensor", "change", "why"), DAMAGE)
def test_a_damaged_tensor_is_named(
    kind: str,
    file: str,
    tensor: str,
    change: Callable[[torch.Tensor], Any],
    why: str,
    made: Path,
    tmp_path: Path,
) -> None:
    directory = Path(shutil.copytree(made / kind, tmp_path / kind))
    rewrite(directory, replaced(tensor, change), file)
    with pytest.raises(ModelError) as refused:
        NativeModel.open(directory)
    assert tensor in refused.value.what
    assert why in refused.value.what


@pytest.mark.parametrize(
    "tensor", [f"{DOWN}.weight_values", "model.layers.0.self_attn.q_proj.bias"]
)
def test_an_absent_tensor_is_named(tensor: str, made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made / "int8", tmp_path / "int8"))

    def remove(tensors: Tensors) -> None:
        del tensors[tensor]

    rewrite(directory, remove, "model.safetensors")
    with pytest.raises(ModelError, match=tensor):
        NativeModel.open(directory)


def test_a_bias_that_nothing_calls_for_is_refused(made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made / "int8", tmp_path / "int8"))

    def add(tensors: Tensors) -> None:
        tensors[f"{DOWN}.bias"] = torch.zeros(48)

    rewrite(directory, add, "model.safetensors")
    with pytest.raises(ModelError, match=f"{DOWN}.bias"):
        NativeModel.open(directory)


@pytest.mark.parametrize("cut", [5, 500])
def test_a_truncated_file_is_refused(cut: int, made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made / "fp32", tmp_path / "fp32"))
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut] if cut == 500 else b"12345")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        NativeModel.open(directory)


def test_packed_linears_keep_their_type(made: Path) -> None:
    with pytest.raises(UsageError, match="packed as int8, not bf16"):
        NativeModel.open(made / "int8", values="bf16")


def test_fp8_is_computed_exactly_as_its_dense_twin(made: Path, tmp_path: Path) -> None:
    write_dense(made / "fp8", tmp_path / "dense")
    texts = random_texts(np.random.default_rng(0), 64, [30, 7])
    with NativeModel.open(made / "fp8", kv_type="fp32") as opened:
        found = random_steps(opened, texts, np.random.default_rng(0))
        said = [str(use) for use in opened.report if "fp8" in str(use)]
    assert said
    assert all("bf16 values" in use and "scales of their rows, exactly" in use for use in said)
    for one, right in zip(found, reference(tmp_path / "dense", texts), strict=True):
        np.testing.assert_allclose(one, right, atol=1e-4)


def test_shards_and_an_embedding_at_an_odd_place(tmp_path: Path) -> None:
    directory = save_random(tmp_path / "whole", "gemma2", head_dim=16, vocab_size=51)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    texts = random_texts(np.random.default_rng(0), 51, [30])
    with NativeModel.open(tmp_path / "shards", kv_type="fp32") as opened:
        found = random_steps(opened, texts, np.random.default_rng(0))[0]
        assert {use.values for use in opened.report} == {"bf16"}
    np.testing.assert_allclose(found, reference(tmp_path / "shards", texts)[0], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    weight=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 70), st.integers(1, 100)),
        elements=st.floats(-9, 9, width=32),
        fill=st.floats(-1, 1, width=32),
    ),
    limit=st.sampled_from([127, 7]),
)
def test_rounding_at_load_is_the_quantiser_of_compile(weight: Any, limit: int) -> None:
    tensor = torch.from_numpy(weight)
    right = rtn(tensor, torch.ones_like(tensor, dtype=torch.bool), limit, 32)
    values, scales = round_to_nearest(weight, limit, 32)
    assert (values == right.values.numpy()).all()
    assert (scales == right.scales.numpy()).all()
    if limit == 7:
        flat = values.reshape(-1)
        assert (unpack_nibbles(pack_nibbles(flat), flat.size) == flat).all()


def test_weights_too_large_for_a_type_are_refused(tmp_path: Path) -> None:
    directory = save_random(tmp_path / "model", "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory, replaced(name, first_set_to(1e8)), "model.safetensors")
    for values in ("fp16", "int8"):
        with pytest.raises(ModelError, match="too large"):
            NativeModel.open(directory, values=values)  # type: ignore[arg-type]


MEMORY = """
import sys
from pathlib import Path
from secateur.serve.native.model import NativeModel

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
with NativeModel.open(sys.argv[1], threads=1, kv_bytes=1 << 30) as model:
    print(resident() - before, model.weight_bytes, before)
"""


def test_only_the_packed_weights_stay_in_memory(tmp_path: Path) -> None:
    """64 MB of weights: neither the file's pages nor copies of them, nor unused KV pages, stay."""
    sizes = {"hidden_size": 480, "intermediate_size": 1920, "num_hidden_layers": 4}
    directory = save_random(tmp_path / "model", "llama", **sizes)
    command = [sys.executable, "-c", MEMORY, str(directory)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights, before = map(int, ran.stdout.split())
    assert weights > 50e6
    assert grown < weights + 30e6
    assert before < 150e6
