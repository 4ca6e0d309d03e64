"""The time of every linear of a model, by itself.

All linears of a model are multiplied one after another, as in a step of the model, so each finds
the weights of the others in the caches. What lies between them (attention, norms) is left out, and
so is what an engine saves by joining linears.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from secateur.bench.latency_results import LayerTime, LinearFacts
from secateur.bench.results import Spread

if TYPE_CHECKING:
    import torch

    from secateur.serve.linear import SparseLinear
    from secateur.serve.native.model import NativeModel


@dataclass(frozen=True)
class Linears:
    """The linears of a model, ready to be timed.

    Attributes:
        facts: what computes each.
        run: multiplies each with so many tokens; the seconds of each.
    """

    facts: tuple[LinearFacts, ...]
    run: Callable[[int], list[float]]


def native_linears(model: NativeModel) -> Linears:
    """Of the native engine; each product is called from Python, which takes some microseconds."""
    matrices = model.matrices
    facts = tuple(
        LinearFacts(
            name=name,
            rows=matrix.rows,
            columns=matrix.columns,
            layout=matrix.layout,
            values=matrix.value_type,
            activations=matrix.activations,
            nbytes=matrix.nbytes,
            why=matrix.why,
        )
        for name, matrix in matrices.items()
    )

    def run(tokens: int) -> list[float]:
        draw = np.random.default_rng(0)
        widths = {matrix.columns for matrix in matrices.values()}
        inputs = {width: draw.normal(size=(tokens, width)).astype(np.float32) for width in widths}
        seconds = []
        for matrix in matrices.values():
            out = np.empty((tokens, matrix.rows), np.float32)
            begun = time.perf_counter()
            matrix.matmul(inputs[matrix.columns], out=out)
            seconds.append(time.perf_counter() - begun)
        return seconds

    return Linears(facts, run)


def torch_linears(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Linears:
    """Of a model of transformers: `torch.nn.Linear` and packed linears."""
    import torch

    from secateur.serve.linear import SparseLinear

    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | SparseLinear)
    }

    @torch.inference_mode()
    def run(tokens: int) -> list[float]:
        seconds = []
        for module in modules.values():
            x = torch.ones(tokens, module.in_features, dtype=dtype, device=device)
            begun = now(device)
            module(x)
            seconds.append(now(device) - begun)
        return seconds

    return Linears(tuple(_facts_of(*each) for each in modules.items()), run)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told to."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_layers(
    linears: Sequence[Linears | None], batches: Sequence[int], rounds: int
) -> list[tuple[LayerTime, ...]]:
    """Time the linears of some models, which take turns.

    Args:
        linears: of each model; None: its engine does not show them.
        batches: numbers of tokens.
        rounds: of each, after one that does not count.
    """
    found: list[list[LayerTime]] = [[] for _ in linears]
    for tokens in batches:
        samples: list[list[list[float]]] = [[] for _ in linears]
        for _ in range(rounds + 1):
            for model, own in zip(linears, samples, strict=True):
                if model is not None:
                    own.append(model.run(tokens))
        for model, own, times in zip(linears, samples, found, strict=True):
            if model is None:
                continue
            for facts, seconds in zip(model.facts, zip(*own[1:], strict=True), strict=True):
                us = Spread.of([second * 1e6 for second in seconds])
                times.append(LayerTime(**facts.model_dump(), tokens=tokens, us=us))
    return [tuple(times) for times in found]


def _facts_of(name: str, module: torch.nn.Linear | SparseLinear) -> LinearFacts:
    from secateur.serve.linear import SparseLinear, kernel_report

    if isinstance(module, SparseLinear):
        (use,) = kernel_report(module)
        layout, values, activations = use.layout, use.values, use.activations
        nbytes, why = use.nbytes, use.why
    else:
        values = activations = str(module.weight.dtype).removeprefix("torch.")
        layout, nbytes, why = "torch", module.weight.nbytes, None
    return LinearFacts(
        name=name,
        rows=module.out_features,
        columns=module.in_features,
        layout=layout,
        values=values,
        activations=activations,
        nbytes=nbytes,
        why=why,
    )
