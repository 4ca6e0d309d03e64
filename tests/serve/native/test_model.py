"""Opening a model for stepping: types, packed forms, wrong batches, what the process imports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from secateur.compile import cpu, pack_model, write_dense
from secateur.compile.config import LIMITS
from secateur.compile.quantize import rtn
from secateur.errors import UsageError
from secateur.serve.native.model import NativeModel
from secateur.serve.native.step import Batch
from tests.compile.conftest import prune_by_hand
from tests.serve.native.stepping import (
    Array,
    make_batch,
    random_steps,
    random_texts,
    reference,
    save_random,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("models") / "llama", "llama", head_dim=20)


def lost(model: NativeModel, directory: Path, lengths: tuple[int, ...] = (40, 9)) -> float:
    """How far logits are from those of transformers: the RMS error relative to their RMS."""
    rng = np.random.default_rng(5)
    texts = random_texts(rng, model.vocabulary_size, list(lengths))
    right = np.concatenate(reference(directory, texts))
    found = np.concatenate(random_steps(model, texts, rng))
    return float(np.sqrt(np.square(found - right).mean() / np.square(right).mean()))


@pytest.mark.parametrize("pattern", ["2:4", "50%", "4:16", "2:4@16x1"])
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
def test_packed_models_compute_what_their_dense_twins_do(
    pattern: str, values: Any, tmp_path: Path
) -> None:
    pruned = prune_by_hand(tmp_path / "pruned", pattern, inner=80, dense=("layers.0.mlp.up_proj",))
    pack_model(
        pruned, tmp_path / "packed", values=values, group_size=32, quantize="rtn", quiet=True
    )
    write_dense(tmp_path / "packed", tmp_path / "dense", values="fp32")
    options: dict[str, Any] = {"kv_type": "fp32", "head": "fp32"}
    with NativeModel.open(
        tmp_path / "packed", activations="fp32" if values in LIMITS else None, **options
    ) as model:
        # 4:16+rest rounds what it leaves over to fp16
        assert lost(model, tmp_path / "dense") < (1e-3 if "+rest" in str(model.report) else 2e-6)
        if pattern in ("2:4", "4:16"):
            assert {use.layout for use in model.report} == {pattern, "dense"}
    if values in LIMITS:
        with NativeModel.open(tmp_path / "packed", **options) as model:
            assert 1e-4 < lost(model, tmp_path / "dense") < 0.05


@pytest.mark.parametrize("values", [None, "bf16", "int8"])
def test_pruned_models_are_served_sparse(values: Any, tmp_path: Path) -> None:
    pruned = prune_by_hand(tmp_path / "pruned", "2:4", kind="qwen2", dense=("q_proj",))
    pack_model(
        pruned, tmp_path / "packed", values=values, group_size=32, quantize="rtn", quiet=True
    )
    options: dict[str, Any] = {"kv_type": "fp32", "head": "fp32"}
    texts = random_texts(np.random.default_rng(0), 64, [20])
    with (
        NativeModel.open(pruned, values=values, **options) as one,
        NativeModel.open(tmp_path / "packed", **options) as other,
    ):
        assert one.report == other.report
        assert {use.layout for use in one.report} == {"2:4", "dense"}
        logits = [random_steps(m, texts, np.random.default_rng(1))[0] for m in (one, other)]
    # dense linears of fp32 and bf16 models are not packed: compile leaves them at their type
    np.testing.assert_allclose(*logits, atol=0.05 if values == "bf16" else 1e-5)


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8", "int4"])
def test_dense_weights_take_a_type_at_load(values: Any, llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            if values in LIMITS:
                kept = torch.ones_like(weight, dtype=torch.bool)
                module.weight.data = rtn(weight, kept, LIMITS[values], 32).dense()
            elif name != "lm_head":
                dtype = torch.bfloat16 if values == "bf16" else torch.float16
                module.weight.data = weight.to(dtype).float()
    model.save_pretrained(tmp_path / "rounded")
    head = values if values in LIMITS else "fp32"
    activations: Any = "fp32" if values in LIMITS else None
    with NativeModel.open(
        llama, values=values, head=head, activations=activations, kv_type="fp32"
    ) as opened:
        assert lost(opened, tmp_path / "rounded") < 2e-6
        assert {use.values for use in opened.report} == {values, head}


def test_fp32_values_that_are_bf16_numbers_are_stored_as_such(tmp_path: Path, llama: Path) -> None:
    for values in ("bf16", "fp16"):
        write_dense(llama, tmp_path / values, values=values)  # type: ignore[arg-type]
        write_dense(tmp_path / values, tmp_path / f"{values}-wide", values="fp32")
        with NativeModel.open(tmp_path / f"{values}-wide", kv_type="fp32") as model:
            assert {use.values for use in model.report} == {values}
            assert lost(model, tmp_path / f"{values}-wide") < 2e-6


@pytest.mark.parametrize(("linears", "head"), [(None, "fp32"), ("int4", "int8"), ("bf16", "fp32")])
def test_the_head_follows_the_linears(linears: Any, head: str, llama: Path) -> None:
    with NativeModel.open(llama, values=linears) as model:
        assert model.report[-1].matrices == 1 or linears is None
        assert model.report[-1].values == head


@pytest.mark.parametrize(("kv_type", "bound"), [("fp16", 4e-3), ("int8", 0.06)])
def test_smaller_kv_types_lose_little(kv_type: Any, bound: float, llama: Path) -> None:
    with NativeModel.open(llama, kv_type=kv_type, kv_bytes=1 << 20) as model:
        assert bound / 100 < lost(model, llama) < bound
        assert model.kv_bytes <= 1 << 20


def test_threads_and_batches_change_nothing(llama: Path) -> None:
    texts = random_texts(np.random.default_rng(0), 101, [90, 33, 64, 2, 17])
    before = cpu.threads()
    try:
        with NativeModel.open(llama, threads=1) as model:
            alone = [random_steps(model, [text], np.random.default_rng(1))[0] for text in texts]
        with NativeModel.open(llama, threads=3) as model:
            together = random_steps(model, texts, np.random.default_rng(2))
    finally:
        cpu.set_threads(before)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-2)  # keys are fp16: the last bit may differ


def changed(batch: Batch, **parts: list[Any]) -> Batch:
    return replace(batch, **{key: np.array(value, np.int32) for key, value in parts.items()})


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"tokens": [1, 2, 101]}, "token 101 is not in the vocabulary of 101"),
        ({"tokens": [1, -2, 3]}, "token -2 "),
        ({"starts": [0, 2, 2]}, "starts go from 0 to 2 for 3 tokens"),
        ({"starts": [0, 3, 3]}, "sequence 1: 0 tokens"),
        ({"starts": [0, 5, 3]}, "sequence"),
        ({"starts": [1, 2, 3]}, "starts go from 1"),
        ({"starts": [0, 3]}, "not one start"),
        ({"positions": [-1, 0]}, "sequence 0: position -1"),
        ({"positions": [0, 200]}, "sequence 1: position 200 and 1 tokens, of at most 128"),
        ({"positions": [2**31 - 1, 0]}, "sequence 0: position 2147483647"),
        ({"positions": [40, 0]}, "sequence 0: 42 tokens in 2 pages of 16"),
        ({"tables": [[3, -1], [1, -1]], "positions": [15, 0]}, "sequence 0: page -1 of"),
        ({"tables": [[99999, 0], [1, -1]]}, "sequence 0: page 99999 of"),
        ({"tables": [[3, 0], [3, 0]]}, "page 3 is written to and used elsewhere"),
        ({"tables": [[3, 3], [1, 0]], "positions": [15, 0]}, "page 3 is written to"),
        ({"wanted": [3]}, "wanted tokens must rise from 0 to 2"),
        ({"wanted": [1, 1]}, "wanted"),
        ({"wanted": [-1]}, "wanted"),
    ],
)
def test_wrong_batches_are_refused_and_harm_nothing(
    parts: dict[str, Any], why: str, llama: Path
) -> None:
    right = make_batch([[1, 2], [3]], [0, 0], [[3, 0], [1, 2]], [0, 2])
    with NativeModel.open(llama, kv_bytes=1 << 20) as model:
        before = model.step(right).copy()
        with pytest.raises(ValueError, match=why):
            model.step(changed(right, **parts))
        assert (model.step(right) == before).all()


def test_arrays_of_other_types_are_refused(llama: Path) -> None:
    right = make_batch([[1, 2]], [0], [[0]], [1])
    with NativeModel.open(llama, kv_bytes=1 << 20) as model:
        with pytest.raises(TypeError):
            model.step(replace(right, tokens=right.tokens.astype(np.int64)))
        assert model.step(replace(right, wanted=right.wanted[:0])).shape == (0, 101)
    with pytest.raises(ValueError, match="closed"):
        model.step(right)


def test_pages_may_be_shared_by_what_only_reads_them(llama: Path) -> None:
    text = random_texts(np.random.default_rng(0), 101, [24])[0]
    with NativeModel.open(llama, kv_type="fp32", kv_bytes=1 << 20) as model:
        model.step(make_batch([text[:16]], [0], [[5]], []))
        both = make_batch([text[16:], text[16:20]], [16, 16], [[5, 1], [5, 2]], [3, 11])
        first, second = model.step(both)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_the_cache_is_as_large_as_asked(llama: Path) -> None:
    with NativeModel.open(llama, max_length=50) as model:
        assert (model.max_length, model.pages) == (50, 64 * 4)
        assert model.nbytes == model.kv_bytes + sum(use.nbytes for use in model.report)
    with NativeModel.open(llama, kv_bytes=3 * model.kv_bytes // model.pages) as model:
        assert (model.max_length, model.pages) == (48, 3)
        assert "48 tokens (of 128: the cache holds no more)" in model.description
    with pytest.raises(UsageError, match="3 pages of keys and values, of 4 that 50 tokens take"):
        NativeModel.open(llama, max_length=50, kv_bytes=3 * model.kv_bytes // model.pages)
    with pytest.raises(UsageError, match="129 tokens for a model of at most 128"):
        NativeModel.open(llama, max_length=129)
    with pytest.raises(UsageError, match="'fp8'"):
        NativeModel.open(llama, kv_type="fp8")  # type: ignore[arg-type]


PROGRAM = """
import json, sys
import numpy as np
from secateur.serve.native.config import obstacle
from secateur.serve.native.model import NativeModel
from secateur.serve.native.step import Batch

def ints(*values):
    return np.array(values, np.int32)

assert obstacle(sys.argv[1]) is None
with NativeModel.open(sys.argv[1], kv_type="fp32", threads=1) as model:
    batch = Batch(ints(7, 8, 9), ints(0, 3), ints(0), ints(4)[None], ints(0, 1, 2))
    print(json.dumps(model.step(batch).tolist()))
heavy = {"torch", "transformers", "scipy", "pandas", "huggingface_hub", "fastapi"}
assert not (found := heavy & set(sys.modules)), found
"""


def test_the_process_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    pruned = prune_by_hand(tmp_path / "pruned", "2:4")
    pack_model(pruned, tmp_path / "packed", values="fp32", quiet=True)
    for directory in (pruned, tmp_path / "packed"):
        command = [sys.executable, "-c", PROGRAM, str(directory)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        logits: Array = np.array(json.loads(ran.stdout))
        np.testing.assert_allclose(logits, reference(pruned, [[7, 8, 9]])[0], atol=1e-5)
