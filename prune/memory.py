"""Keeping a run within its memory: what goes to disk, and how many linears are observed at once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import UsageError
from secateur.model import StreamedModel
from secateur.prune.method import Method

if TYPE_CHECKING:
    from secateur.prune.plan import LayerPlan

# What libraries take on top once they compute: threads, buffers, code loaded when first used.
LIBRARIES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a run stays within its memory.

    Attributes:
        spill: whether hidden states are kept in files.
        groups: for each block the linears whose statistics are in memory together; the sequences
            run through the block once for each group.
        peak_bytes: estimated peak, the interpreter and its libraries included.
    """

    spill: bool
    groups: list[list[list[str]]]
    peak_bytes: int


def plan_memory(
    model: StreamedModel,
    layers: Sequence[LayerPlan],
    method: Method,
    samples: int,
    length: int,
    budget: int | None,
) -> MemoryPlan:
    """Decide what is held in memory.

    Args:
        layers: every linear of the model.
        method: decides which statistics there are, and what a solver takes.
        samples, length: of the calibration; tokens, or patches of an image.
        budget: peak bytes allowed; None: what the machine has free now, as far as that goes.

    Raises:
        UsageError: the budget is below what the largest block takes; says how much that is.
    """
    base = resident()
    states_bytes = 4 * samples * length * int(model.module.config.hidden_size)
    limit = base + _available() if budget is None else budget
    stores = len(model.blocks) + 2 if "gradients" in method.needs else 1
    blocks: list[list[LayerPlan]] = [[] for _ in model.blocks]
    for layer in layers:
        blocks[layer.block].append(layer)
    fixed = max(_block_bytes(model, index, own, method, length) for index, own in enumerate(blocks))
    if method.regional is not None:
        fixed += 4 * states_bytes
    outside = _outside_bytes(model, method, length)
    every = max(sum(_statistics_bytes(layer, method) for layer in own) for own in blocks)
    together = base + max(fixed + every, outside) + stores * states_bytes
    if together <= limit:
        groups = [[[layer.name for layer in own]] for own in blocks]
        return MemoryPlan(False, groups, together)
    room = limit - base - fixed
    largest = max(_statistics_bytes(layer, method) for layer in layers)
    if method.regional is not None:
        largest = every
    least = base + max(fixed + largest, outside)
    if least > limit and budget is not None:
        raise UsageError(
            f"{budget / 2**30:.2f} GiB of memory are too few: this model, method and calibration "
            f"need about {least / 2**30:.2f} GiB",
            f"give --memory {least / 2**30 * 1.05 + 0.05:.1f}GiB, shorter sequences, or a method "
            "that needs less",
        )
    groups = [_split(own, method, room) for own in blocks]
    return MemoryPlan(True, groups, max(least, min(limit, together)))


def _split(layers: list[LayerPlan], method: Method, room: int) -> list[list[str]]:
    """Consecutive linears whose statistics fit into ``room`` bytes together."""
    groups: list[list[str]] = []
    free = 0
    for layer in layers:
        size = _statistics_bytes(layer, method)
        if not groups or size > free:
            groups.append([])
            free = room
        groups[-1].append(layer.name)
        free -= size
    return groups


def _statistics_bytes(layer: LayerPlan, method: Method) -> int:
    """An upper limit: linears that share an input are counted as if they did not."""
    width = layer.shape[1]
    return 4 * width * (width if "gram" in method.needs else 1024)


def _block_bytes(
    model: StreamedModel, index: int, layers: list[LayerPlan], method: Method, length: int
) -> int:
    """A block to compute with, as it is stored and as it will be written, and a solver at work."""
    stored = sum(model.checkpoint.nbytes(name) for name in model.tensor_names(index))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    per_square, per_weight = method.workspace
    solver = max(
        per_square * layer.shape[1] ** 2 + per_weight * layer.shape[0] * layer.shape[1]
        for layer in layers
    )
    learning = 0
    if method.regional is not None or {"gradients", "regional"} & method.needs:
        # Gradients and their sums, or Adam's two, and what autograd keeps of a sample.
        learning = 12 * length * sum(sum(layer.shape) for layer in layers)
        learning += (24 if method.regional is not None else 12) * weights
    return 4 * weights + 2 * stored + max(solver, learning) + LIBRARIES


def _outside_bytes(model: StreamedModel, method: Method, length: int) -> int:
    """Embeddings, and for gradients also the output head with the logits of a sample."""
    checkpoint = model.checkpoint
    names = model.tensor_names(None)
    weights = sum(math.prod(checkpoint.shape(name)) for name in names)
    largest = max((checkpoint.nbytes(name) for name in names), default=0)
    vocabulary = int(checkpoint.config.get("vocab_size", 0))
    logits = vocabulary * length if "gradients" in method.needs else 0
    return 4 * weights + largest + 4 * 4 * logits + LIBRARIES


def resident() -> int:
    """Bytes that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: what Python, torch and transformers take, roughly
        return 600 * 2**20
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available() -> int:
    """Bytes that the machine could still give."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 2**62
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
