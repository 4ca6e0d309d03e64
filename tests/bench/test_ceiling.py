"""Ceilings by bytes against counts by hand, and the tables of docs/gpu.md against both."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from secateur.bench.ceiling import (
    CeilingValues,
    ModelWeights,
    ceiling_row,
    compute_ceiling,
    model_weights,
    weight_bytes,
)
from secateur.bench.gpu_kernels import GpuKernelsResult
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern

LLAMA = Path(__file__).with_name("llama-3.1-8b.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
DOCS = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "pattern", "group", "total"),
    [
        ("fp32", "dense", None, 4),
        ("tf32", "1:2", None, 2.25),
        ("bf16", "2:4", None, 1.125),
        ("fp8", "2:4", None, 0.625),
        ("int4", "2:4", None, 0.375),
        ("int4", "2:4", 128, 0.390625),
        ("fp16", "70%", None, 0.725),
        ("int8", "50%@16x1", 64, 0.5 + 1 / 128 + 2 / 64),
    ],
)
def test_bytes_of_a_weight(values: Any, pattern: str, group: int | None, total: float) -> None:
    assert weight_bytes(values, Pattern.parse(pattern), group).total == pytest.approx(total)


def test_tf32_is_one_of_two() -> None:
    with pytest.raises(UsageError, match="tf32 tensor cores cannot use 2:4"):
        weight_bytes("tf32", Pattern.parse("2:4"))
    unknown: Any = "bf61"
    with pytest.raises(UsageError, match="'bf61' is not known"):
        weight_bytes(unknown, Pattern.parse("2:4"))


def test_llama_by_hand() -> None:
    hidden, inner, layers, key_value = 4096, 14336, 32, 1024
    block = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner
    weights = model_weights(LLAMA)
    assert weights.prunable == layers * block
    assert weights.head == 128256 * hidden
    assert weights.other == (2 * layers + 1) * hidden
    assert weights.cache == 2 * layers * key_value
    (row,) = compute_ceiling(
        LLAMA, "2:4", "fp8", batches=(16,), contexts=(8192,), bandwidth_gb_per_s=3350
    ).rows
    cache = 16 * 8192 * 2 * layers * key_value * 2
    rest = 2 * (weights.head + weights.other) + cache
    assert row.cache_bytes == cache
    assert row.bytes == weights.prunable * 0.625 + rest
    assert row.dense_bytes == weights.prunable * 2 + rest
    assert row.speedup == row.dense_bytes / row.bytes
    assert row.same_type_speedup == (weights.prunable * 1 + rest) / row.bytes
    assert row.tokens_per_s == pytest.approx(16 * 3350e9 / row.bytes)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "gpt2", "bloom"])
def test_every_weight_is_counted_once(family: str, of_family: Callable[[str], Path]) -> None:
    """What is read is all there is, but for tables of which a step takes a row."""
    path = of_family(family)
    weights = model_weights(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    head = model.get_output_embeddings().weight
    unread = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    unread.pop(id(head), None)
    total = sum(p.numel() for p in model.parameters())
    assert weights.prunable + weights.head + weights.other + sum(unread.values()) == total
    with torch.no_grad():
        cache = model(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert weights.cache == stored // 3


@given(
    st.sampled_from(["2:4", "50%", "90%", "50%@8x1"]),
    st.sampled_from(["bf16", "int8", "fp8", "int4"]),
    st.integers(1, 256),
    st.integers(0, 1 << 17),
)
def test_more_context_never_helps(pattern: str, values: Any, batch: int, context: int) -> None:
    weights = ModelWeights(prunable=7 * 10**9, head=5 * 10**8, other=10**6, cache=65536)
    size = weight_bytes(values, Pattern.parse(pattern))
    same = weight_bytes(values, Pattern())
    first, second = (
        ceiling_row(weights, size, same, batch, length) for length in (context, context + 1024)
    )
    assert 1 < second.same_type_speedup < first.same_type_speedup < same.total / size.total
    assert second.speedup < first.speedup < 2 / size.total


def test_what_has_no_ceiling(tmp_path: Path) -> None:
    config = json.loads(LLAMA.read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(ModelError, match="no ceiling"):
        model_weights(tmp_path)
    path.write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        model_weights(tmp_path)
    path.write_text(json.dumps(config | {"num_attention_heads": "many"}))
    with pytest.raises(ModelError, match="does not describe a model"):
        model_weights(tmp_path)
    with pytest.raises(UsageError, match="negative"):
        compute_ceiling(LLAMA, batches=(0,))


def test_the_command(secateur_command: Callable[..., Any]) -> None:
    said = secateur_command("bench", "ceiling", LLAMA, "--bandwidth", 3350, "--values", "int4")
    assert re.search(r"^ *1 +0 +15\.01 +3\.67 +0\.00 +4\.09 +1\.24 +913", said.stdout, re.MULTILINE)
    assert "not measured" in said.stdout
    facts = json.loads(secateur_command("bench", "ceiling", LLAMA, "--json").stdout)
    assert facts["schema"] == "secateur/ceiling/1"
    assert facts["rows"][0]["speedup"] == pytest.approx(1.686, abs=1e-3)


def table_below(heading: str) -> list[list[str]]:
    """The first table of docs/gpu.md below a heading, its rule left out."""
    section = DOCS.partition(f"\n{heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert lines is not None, heading
    titles, _, *rows = lines[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (titles, *rows)]


def test_the_printed_bytes_of_a_weight() -> None:
    (_, *patterns), *rows = table_below("### Bytes of a weight")
    printed = set()
    for name, *cells in rows:
        values, _, group = name.partition(", a scale for ")
        for one in values.split(", "):
            printed.add(one)
            for pattern, cell in zip(patterns, cells, strict=True):
                kept = Pattern.parse("1:2" if one == "tf32" and pattern == "2:4" else pattern)
                if one == "tf32" and str(kept) not in ("dense", "1:2"):
                    assert cell == "-"
                    continue
                chosen: Any = one
                total = weight_bytes(chosen, kept, int(group) if group else None).total
                assert cell == f"{total:.4g} ({2 / total:.2f}x)", (name, pattern)
    assert printed == set(get_args(CeilingValues))


def test_the_printed_ceilings_of_llama() -> None:
    (_, *columns), *rows = table_below("### Llama-3.1-8B")
    weights = model_weights(LLAMA)
    for name, *cells in rows:
        values: Any
        values, pattern = name.split(" ")
        size = weight_bytes(values, Pattern.parse(pattern))
        same = weight_bytes(values, Pattern())
        for column, cell in zip(columns, cells, strict=True):
            batch, context = map(int, column.split(" x "))
            row = ceiling_row(weights, size, same, batch, context)
            assert cell == f"{row.speedup:.2f} / {row.same_type_speedup:.2f}", (name, column)


def test_the_printed_numbers_of_the_text() -> None:
    total = weight_bytes("bf16", Pattern.parse("2:4")).total
    assert f"multiplies for\n{989e12 / (3.35e12 * 2 / total):.0f} tokens" in DOCS
    assert f"= {1 / (0.2 + 0.8 / 1.5):.2f} times" in DOCS
    weights = model_weights(LLAMA)
    assert f"{weights.prunable / 1e9:.2f} G weights" in DOCS
    assert f"The head ({weights.head / 1e9:.2f} G)" in DOCS
    assert f"({2 * weights.cache // 1024} KiB to a position)" in DOCS


def test_the_page_has_the_numbers_of_the_run_on_a_gpu() -> None:
    ends = {
        "h100-kernels.json": ["triton", "own", "cusparselt", "unpack"],
        "h100-kernels-fp8.json": ["triton", "own-fp8", "cusparselt-fp8", "scaled-mm"],
    }
    for name, columns in ends.items():
        told = json.loads((PAGE.parent / "gpu" / name).read_text(encoding="utf-8"))
        GpuKernelsResult.model_validate(told)
        for group in told["groups"]:
            times = {row["name"]: row.get("median_us") for row in group["kernels"]}
            dense = times["dense"]
            cells = [
                f"{dense / times[f'2:4 {end}']:.2f}" for end in columns if times.get(f"2:4 {end}")
            ]
            shape = f"{group['rows']} x {group['columns']}"
            head = f"| {shape} | {group['values']} | {group['tokens']} | {dense:.1f} | "
            if group["values"] in ("bf16", "fp8"):
                assert head + " | ".join(cells) in DOCS
    assert "Not run on a GPU: whole models, vLLM, any other GPU" in " ".join(DOCS.split())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*absent\.json"):
        compute_ceiling(tmp_path / "absent.json")
