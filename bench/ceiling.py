"""How much faster sparse weights can make a model at most: by the bytes that a step must read.

A decoding step reads every weight once, and of each sequence the keys and values of its context,
which pruning leaves alone. No kernel is faster than memory: bytes before over bytes after is a
ceiling (Amdahl's law on bytes). Arithmetic, not measurement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from secateur.architecture import architecture_of
from secateur.bench.results import _Facts
from secateur.checkpoint import CONFIG, read_json
from secateur.errors import ModelError, UsageError, did_you_mean
from secateur.pattern import Pattern

CeilingValues = Literal["fp32", "tf32", "bf16", "fp16", "int8", "fp8", "int4"]
_BYTES: dict[str, float] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
_BYTES |= {"int4": 0.5}
_SCALE_BYTES = 2


class WeightBytes(_Facts):
    """Bytes of one weight of the dense matrix, on average.

    Attributes:
        values: of the kept values.
        positions: of what says where they are: on tensor cores 4 bits for 2 of 4 (fp32: for 1 of
            2); else a bit for each weight, shared by the rows of a block.
        scales: of integer groups.
    """

    values: float
    positions: float
    scales: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.values + self.positions + self.scales


def weight_bytes(
    values: CeilingValues, pattern: Pattern, group_size: int | None = None
) -> WeightBytes:
    """What a weight takes in memory.

    ``tf32`` is what tensor cores make of fp32: 1:2, with as many bits of position for each kept
    value as 2:4 has.

    Args:
        values: type of the kept values.
        pattern: which are kept.
        group_size: dense weights that share an fp16 scale; None: no such scales.

    Raises:
        UsageError: the value type is not known, or tf32 with a pattern other than 1:2 or dense.
    """
    if values not in get_args(CeilingValues):
        raise UsageError(f"value type {values!r} is not known", did_you_mean(values, _BYTES))
    if values == "tf32" and not (pattern.is_dense or str(pattern) == "1:2"):
        raise UsageError(f"tf32 tensor cores cannot use {pattern}", "they use 1:2; or take fp32")
    bits = 0.0 if pattern.is_dense else 1 / pattern.rows
    if values == "tf32":
        bits *= 2
    return WeightBytes(
        values=_BYTES[values] * float(1 - pattern.removed),
        positions=bits / 8,
        scales=_SCALE_BYTES / group_size if group_size else 0.0,
    )


class ModelWeights(_Facts):
    """What a decoding step of a model reads, in numbers of weights.

    Attributes:
        prunable: weights of the linears in its blocks.
        head: weights of the output layer, which stays dense.
        other: norms and biases.
        cache: numbers of the key-value cache for one position of one sequence.
    """

    prunable: int
    head: int
    other: int
    cache: int


def model_weights(path: str | Path) -> ModelWeights:
    """Count the weights of a model from its ``config.json`` alone.

    Args:
        path: of the file, or of a directory that holds one.

    Raises:
        ModelError: no such file, an unsupported architecture, no text model, or a mixture of
            experts (how many of its bytes a step reads depends on the text).
    """
    import accelerate
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.initialization import no_init_weights
    from transformers.pytorch_utils import Conv1D

    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ModelError(f"there is no file {file}", "give a model directory or its config.json")
    architecture = architecture_of(read_json(file))
    if architecture.reads != "text" or architecture.experts is not None:
        raise ModelError(
            f"there is no ceiling for {file}: what a step reads is not its weights, each once",
            "give a text model without experts",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
        with accelerate.init_empty_weights(include_buffers=True), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as fault:
        raise ModelError(
            f"{file} does not describe a model: {fault}", "copy it from the original model"
        ) from fault
    blocks = model.get_submodule(architecture.blocks)
    linears = [m for m in blocks.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    prunable = sum(m.weight.numel() for m in linears)
    head = model.get_output_embeddings().weight
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    unread = sum(t.numel() for t in tables if t is not head)  # a step reads a row of each
    total = sum(p.numel() for p in model.parameters())
    return ModelWeights(
        prunable=prunable,
        head=head.numel(),
        other=total - prunable - head.numel() - unread,
        cache=_cache(model),
    )


def _cache(model: Any) -> int:
    """Numbers that a model without weights keeps of one position: it says so itself."""
    import torch

    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device="meta")
        layers = model(token, use_cache=True).past_key_values.layers
    return int(sum(layer.keys.numel() + layer.values.numel() for layer in layers))


class CeilingRow(_Facts):
    """The ceiling of one batch and context.

    Attributes:
        batch: sequences decoded at once.
        context: positions that each attends to.
        dense_bytes, bytes: that a step reads, of the dense 16-bit model and of the sparse one.
        cache_bytes: of these, the key-value cache's.
        speedup: the ceiling: dense_bytes / bytes.
        same_type_speedup: the ceiling over a dense model of the same value type.
        tokens_per_s: the ceiling at a bandwidth; None if none was given.
    """

    batch: int
    context: int
    dense_bytes: float
    bytes: float
    cache_bytes: float
    speedup: float
    same_type_speedup: float
    tokens_per_s: float | None


class CeilingResult(_Facts):
    """How much a pattern and value type can bring a model. Computed, not measured."""

    schema_: Literal["secateur/ceiling/1"] = Field("secateur/ceiling/1", alias="schema")
    model: str
    pattern: str
    values: CeilingValues
    group_size: int | None
    weights: ModelWeights
    bytes_per_weight: WeightBytes
    bandwidth_gb_per_s: float | None
    rows: tuple[CeilingRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return self.model_dump(mode="json", by_alias=True)


def compute_ceiling(
    model: str | Path,
    pattern: str = "2:4",
    values: CeilingValues = "bf16",
    *,
    batches: tuple[int, ...] = (1, 16, 64),
    contexts: tuple[int, ...] = (0, 8192),
    group_size: int | None = None,
    bandwidth_gb_per_s: float | None = None,
) -> CeilingResult:
    """The ceilings of a model from its ``config.json`` alone.

    The head, norms, biases and the cache stay 16-bit and dense. Activations are not counted, and
    all layers attend to all of the context.

    Args:
        model: a ``config.json``, or a directory that holds one.
        pattern, values, group_size: of the linears in the blocks; see `weight_bytes`.
        batches, contexts: a row for each pair.
        bandwidth_gb_per_s: of the GPU's memory, in 10^9 bytes.

    Raises:
        UsageError: a pattern, type or number that cannot be.
        ModelError: see `model_weights`.
    """
    if min(batches) < 1 or min(contexts) < 0 or (bandwidth_gb_per_s or 1) <= 0:
        raise UsageError(
            f"batches {batches}, contexts {contexts} or bandwidth {bandwidth_gb_per_s} is negative",
            "give batches of 1 or more, contexts of 0 or more and a positive bandwidth",
        )
    kept = Pattern.parse(pattern)
    size = weight_bytes(values, kept, group_size)
    same = weight_bytes(values, Pattern(), group_size)
    weights = model_weights(model)
    return CeilingResult(
        model=str(model),
        pattern=str(kept),
        values=values,
        group_size=group_size,
        weights=weights,
        bytes_per_weight=size,
        bandwidth_gb_per_s=bandwidth_gb_per_s,
        rows=tuple(
            ceiling_row(weights, size, same, batch, context, bandwidth_gb_per_s)
            for context in contexts
            for batch in batches
        ),
    )


def ceiling_row(
    weights: ModelWeights,
    size: WeightBytes,
    same: WeightBytes,
    batch: int,
    context: int,
    bandwidth_gb_per_s: float | None = None,
) -> CeilingRow:
    """The ceiling of one batch and context.

    Args:
        weights: of the model.
        size, same: of a weight as it is, and as it would be if it were dense.
        batch, context, bandwidth_gb_per_s: as of `compute_ceiling`.
    """
    cache = 2.0 * weights.cache * context * batch
    rest = 2.0 * (weights.head + weights.other) + cache
    dense, same_type, sparse = (
        weights.prunable * each + rest for each in (2.0, same.total, size.total)
    )
    rate = batch * bandwidth_gb_per_s * 1e9 / sparse if bandwidth_gb_per_s else None
    return CeilingRow(
        batch=batch,
        context=context,
        dense_bytes=dense,
        bytes=sparse,
        cache_bytes=cache,
        speedup=dense / sparse,
        same_type_speedup=same_type / sparse,
        tokens_per_s=rate,
    )
