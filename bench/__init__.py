"""bench: was it worth it? Accuracy and speed of models against their dense twin.

``measure_accuracy``, ``measure_latency``, ``measure_serving`` and their like return typed
results with a versioned schema; ``summarise`` puts one dense and one sparse model side by side.
"""

from __future__ import annotations

from secateur.bench.accuracy import measure_accuracy
from secateur.bench.ceiling import CeilingResult, compute_ceiling
from secateur.bench.kernel_results import KernelSettings, KernelsResult
from secateur.bench.kernels import measure_kernels
from secateur.bench.latency import measure_latency
from secateur.bench.latency_results import LatencyResult
from secateur.bench.method_results import MethodsResult
from secateur.bench.methods import measure_methods
from secateur.bench.packing import PackingResult, PackingSettings, measure_packing
from secateur.bench.results import AccuracyResult
from secateur.bench.serving import ServingSettings, measure_serving
from secateur.bench.serving_results import ServingResult
from secateur.bench.subjects import model_bytes
from secateur.bench.summary import render_summary, summarise

__all__ = [
    "AccuracyResult",
    "CeilingResult",
    "KernelSettings",
    "KernelsResult",
    "LatencyResult",
    "MethodsResult",
    "PackingResult",
    "PackingSettings",
    "ServingResult",
    "ServingSettings",
    "compute_ceiling",
    "measure_accuracy",
    "measure_kernels",
    "measure_latency",
    "measure_methods",
    "measure_packing",
    "measure_serving",
    "model_bytes",
    "render_summary",
    "summarise",
]
