"""The side-by-side summary and its table."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from secateur.bench import (
    measure_accuracy,
    measure_latency,
    model_bytes,
    render_summary,
    summarise,
)
from secateur.errors import UsageError
from secateur.recipe import Accuracy, Latency


def test_summary(dense: Path, sparse: Path, text: Path, tmp_path: Path) -> None:
    reading = Accuracy(data=str(text), window=16, windows=2)
    accuracy = measure_accuracy([sparse], reading, against=dense)
    speed = measure_latency(
        [sparse], Latency(prompt=4, new_tokens=2, rounds=2, min_seconds=0), against=dense
    )
    summary = summarise(dense, sparse, accuracy, speed)
    keys = ["bytes", "perplexity", "kl", "prefill_tokens_per_s", "decode_tokens_per_s"]
    assert {side: list(column) for side, column in summary.items()} == dict.fromkeys(
        ("dense", "sparse", "ratio"), keys
    )
    model = accuracy.models[0]
    assert model.kl is not None
    assert model.perplexity_ratio is not None
    assert speed.models[0].points[0].decode_speedup is not None
    assert summary["dense"]["kl"] == 0.0
    assert summary["dense"]["bytes"] == model_bytes(dense)
    assert summary["sparse"]["kl"] == model.kl.value
    assert summary["ratio"]["kl"] is None
    assert summary["ratio"]["bytes"] == pytest.approx(1.0)
    assert summary["ratio"]["perplexity"] == pytest.approx(model.perplexity_ratio.value)
    assert summary["ratio"]["decode_tokens_per_s"] == pytest.approx(
        speed.models[0].points[0].decode_speedup.value
    )

    console = Console(file=io.StringIO(), width=100)
    console.print(render_summary(summary))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "decode, tokens/s" in shown
    assert "sparse / dense" in shown
    assert f"{summary['ratio']['perplexity']:.3f}" in shown

    with pytest.raises(UsageError, match="accuracy result does not contain"):
        summarise(dense, tmp_path, accuracy, speed)
    with pytest.raises(UsageError, match="was not measured against"):
        summarise(sparse, dense, accuracy, speed)
