"""One dense and one sparse model side by side: the five numbers that answer "was it worth it?"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from secateur.bench.latency_results import LatencyResult, PointLatency
from secateur.bench.results import AccuracyResult, ModelAccuracy
from secateur.bench.subjects import model_bytes
from secateur.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

Summary = dict[str, dict[str, float | None]]

_LABELS = {
    "bytes": "weight files, MB",
    "perplexity": "perplexity",
    "kl": "KL from dense, nats/token",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
}


def summarise(
    dense: str | Path, sparse: str | Path, accuracy: AccuracyResult, latency: LatencyResult
) -> Summary:
    """Compare two models that both results contain; their speed is that of the first point.

    Returns:
        ``{"dense": …, "sparse": …, "ratio": …}``, each with the keys bytes, perplexity, kl,
        prefill_tokens_per_s and decode_tokens_per_s. Ratios are sparse/dense; that of kl is None.

    Raises:
        UsageError: a model is not in a result, or accuracy was not measured against ``dense``.
    """
    columns: Summary = {}
    for name, path in (("dense", dense), ("sparse", sparse)):
        quality, speed = _accuracy_of(path, accuracy), _latency_of(path, latency)
        columns[name] = {
            "bytes": model_bytes(path),
            "perplexity": quality.perplexity.value,
            "kl": quality.kl.value if quality.kl else None,
            "prefill_tokens_per_s": speed.prefill_tokens_per_s.mean,
            "decode_tokens_per_s": speed.decode_tokens_per_s.mean,
        }
    if accuracy.baseline is None or accuracy.baseline.path != str(dense):
        raise UsageError(f"accuracy was not measured against {dense}", "measure with against=dense")
    columns["dense"]["kl"] = 0.0
    columns["ratio"] = {
        key: _ratio(columns["sparse"][key], columns["dense"][key]) for key in _LABELS
    }
    return columns


def render_summary(summary: Summary) -> Table:
    """The summary as a table: a row for each number, the ratio as sparse/dense."""
    from rich.table import Table

    table = Table("", "dense", "sparse", "sparse / dense")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label in _LABELS.items():
        scale = 1e6 if key == "bytes" else 1.0
        cells = [_number(summary[side][key], scale) for side in ("dense", "sparse")]
        ratio = summary["ratio"][key]
        table.add_row(label, *cells, "" if ratio is None else f"{ratio:.3f}")
    return table


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return "n/a"
    value /= scale
    return f"{value:.1f}" if value >= 100 else f"{value:.4g}"


def _ratio(sparse: float | None, dense: float | None) -> float | None:
    return sparse / dense if sparse is not None and dense else None


def _accuracy_of(path: str | Path, result: AccuracyResult) -> ModelAccuracy:
    for model in result.everyone:
        if model.path == str(path):
            return model
    raise UsageError(f"the accuracy result does not contain {path}", "measure it with the others")


def _latency_of(path: str | Path, result: LatencyResult) -> PointLatency:
    for model in result.everyone:
        if model.path == str(path):
            return model.points[0]
    raise UsageError(f"the latency result does not contain {path}", "measure it with the others")
