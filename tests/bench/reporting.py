"""Small results made by hand, for the tests of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.artifact import LayerFacts, Manifest
from secateur.bench.latency_results import LatencyResult, ModelLatency, PointLatency
from secateur.bench.results import (
    AccuracyResult,
    Environment,
    Estimate,
    ModelAccuracy,
    Spread,
    TextFacts,
)
from secateur.bench.rivals import RivalRow, RivalsResult
from secateur.checkpoint import write_json

ENVIRONMENT = Environment(
    date="2026-01-01T00:00:00+00:00",
    cpu="a processor </script>",
    cores=2,
    ram_bytes=2**34,
    device="cpu",
    threads=2,
    load_average=0.1,
    versions={"secateur": "0"},
)


def spread(mean: float) -> Spread:
    return Spread(mean=mean, stddev=0.1, min=mean, max=mean, samples=(mean, mean))


def estimate(value: float) -> Estimate:
    return Estimate(value=value, stddev=0.1, standard_error=0.05)


def quality(path: str, size: int, perplexity: float, dense: float | None) -> ModelAccuracy:
    return ModelAccuracy(
        path=path,
        bytes=size,
        nll=estimate(1.0),
        perplexity=estimate(perplexity),
        perplexity_ratio=None if dense is None else estimate(perplexity / dense),
        kl=None if dense is None else estimate(0.1),
        top1_agreement=None if dense is None else estimate(0.9),
        window_nll=(1.0,),
    )


def accuracy(models: dict[str, tuple[int, float]], baseline: str) -> AccuracyResult:
    """Of sizes and perplexities by path; ``baseline`` is one of them."""
    dense = models[baseline][1]
    made = {
        path: quality(path, size, value, None if path == baseline else dense)
        for path, (size, value) in models.items()
    }
    return AccuracyResult(
        command="secateur bench accuracy …",
        environment=ENVIRONMENT,
        dtype="float32",
        notes=("a note <b>",),
        top_k=5,
        text=TextFacts(name="t", tokenizer="t", tokens=9, evaluated_tokens=9, sha256="0"),
        window=8,
        stride=8,
        windows=1,
        predicted_tokens=7,
        baseline=made.pop(baseline),
        models=tuple(made.values()),
    )


def latency(rates: dict[str, dict[int, float]], baseline: str, engine: str) -> LatencyResult:
    """Of decode rates by path and batch."""
    made = {}
    for path, curve in rates.items():
        points = [
            PointLatency(
                prompt=8,
                batch=batch,
                prefill_tokens_per_s=spread(2 * rate),
                decode_tokens_per_s=spread(rate),
                prefill_speedup=None,
                decode_speedup=None
                if path == baseline
                else estimate(rate / rates[baseline][batch]),
                joules=None,
                warnings=(),
            )
            for batch, rate in curve.items()
        ]
        layout = "dense bf16" if path == baseline else "2:4 bf16"
        made[path] = ModelLatency(
            path=path,
            engine="llama.cpp" if path.endswith(".gguf") else engine,
            bytes=10,
            memory_bytes=10,
            modules={layout: 3},
            points=tuple(points),
            layers=(),
        )
    return LatencyResult(
        environment=ENVIRONMENT,
        dtype="float32",
        notes=(),
        prompt=(8,),
        new_tokens=4,
        batch=tuple(next(iter(rates.values()))),
        rounds=2,
        measured_seconds=1.0,
        peak_rss_bytes=1,
        energy="none",
        crossovers=(),
        baseline=made.pop(baseline),
        models=tuple(made.values()),
    )


def rivals() -> RivalsResult:
    return RivalsResult(
        environment=ENVIRONMENT,
        dtype="float32",
        notes=(),
        prompt=8,
        new_tokens=4,
        batch=1,
        threads=2,
        passes=1,
        rows=(
            RivalRow(path="m/dense", engine="native", bytes=20, decode_tokens_per_s=spread(4.0)),
            RivalRow(path="m/dense", engine="vllm", bytes=20, decode_tokens_per_s=spread(3.0)),
            RivalRow(path="m/dense", engine="openvino", absent="not here"),
        ),
    )


def manifest() -> Manifest:
    layers = {
        f"model.layers.{i}.{name}": LayerFacts(
            shape=(4, 4),
            pattern="2:4",
            sparsity=0.5,
            relative_error=0.1 * i,
            dense_bytes=8,
            bytes=5,
        )
        for i in range(3)
        for name in ("mlp.up_proj", "self_attn.q_proj")
    }
    return Manifest(kind="packed", source={}, recipe={}, layers=layers)


def write_all(folder: Path) -> list[str]:
    """One of each in a folder; returns what `secateur report` is given."""
    results: dict[str, Any] = {
        "accuracy.json": accuracy(
            {
                "m/dense": (20, 10.0),
                "m/sparse": (10, 12.0),
                "m/Q4.gguf": (6, 11.0),
            },
            "m/dense",
        ),
        "latency.json": latency(
            {
                "m/dense": {1: 4.0, 8: 5.0},
                "m/sparse": {1: 8.0, 8: 4.5},
                "m/Q4.gguf": {1: 9.0, 8: 5.0},
            },
            "m/dense",
            "native",
        ),
        "rivals.json": rivals(),
    }
    for name, result in results.items():
        write_json(folder / name, result.to_json())
    (folder / "sparse").mkdir()
    write_json(folder / "sparse/manifest.json", manifest().model_dump(mode="json", by_alias=True))
    return [str(folder / name) for name in [*results, "sparse"]]
