"""The format ``dense``: plain Hugging Face weights, in another value type if one is asked for.

It is the control of every measurement (the dense twin of a packed model, in the same value type),
and the way back from a packed model for programs that know nothing of it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from secateur.artifact import Artifact, Manifest, library_versions, refuse_existing
from secateur.checkpoint import CONFIG, Checkpoint, write_json
from secateur.compile.config import LIMITS, QUANT_METHOD
from secateur.compile.orphan import OrphanCheckpoint
from secateur.compile.packed import PackedCheckpoint
from secateur.compile.report import PackReport
from secateur.compile.shards import write_shards
from secateur.compile.values import VALUE_TYPES, check_value_type, convert, dtype_of, with_dtype
from secateur.errors import UsageError
from secateur.recipe import ValueType


def open_dense(path: str | Path) -> PackedCheckpoint | OrphanCheckpoint:
    """The dense weights of any model directory: dense, pruned, packed or an orphan.

    Raises:
        ModelError: it is damaged, or stored in a form that is not read here.
    """
    quantization = Checkpoint(path).config.get("quantization_config") or {}
    packed = quantization.get("quant_method") == QUANT_METHOD
    return PackedCheckpoint(path) if packed else OrphanCheckpoint(path)


def write_dense(
    model: str | Path,
    output: str | Path,
    *,
    values: ValueType | None = None,
    overwrite: bool = False,
) -> PackReport:
    """Write a dense, pruned or packed model, or an orphaned checkpoint, as plain dense weights.

    Integer and fp8 values times their scales are rounded once, to ``values``, or to the type that
    the model's config names.

    Args:
        model: the directory; zeros stay where they are.
        output: directory to make; it appears whole or not at all.
        values: convert all floating-point weights to this type; None keeps them.
        overwrite: replace an existing output.

    Raises:
        ModelError: the model is missing or damaged, or a value does not fit ``values``.
        UsageError: the output exists, or ``values`` is unknown or not floating-point.
    """
    started = time.perf_counter()
    check_value_type(values)
    if values in LIMITS:
        raise UsageError(
            f"the format dense has floating-point weights, not {values}",
            "use --values fp32, bf16 or fp16, or the format packed",
        )
    refuse_existing(Path(output), overwrite)
    source = open_dense(model)
    named = VALUE_TYPES[dtype_of(source.config)]
    notes = source.notes if isinstance(source, OrphanCheckpoint) else []
    hashes = source.sha256()
    recipe = {"compile": {"format": "dense", "values": values}}

    def stored(name: str) -> dict[str, torch.Tensor]:
        wanted = values or (named if source.decoded(name) else None)
        return {name: convert(name, source.load(name), wanted)}

    with Artifact(output, {"source": hashes, **recipe}, overwrite) as artifact:
        read, written = write_shards(artifact.path, source, stored)
        write_json(artifact.path / CONFIG, with_dtype(source.config, values))
        manifest = Manifest(
            kind="dense",
            versions=library_versions("torch", "safetensors"),
            source={"sha256": hashes},
            recipe=recipe,
            layers={},
            notes=notes,
        )
        artifact.commit(manifest, {"compile": {"seconds": time.perf_counter() - started}})
    return PackReport(
        output=str(output),
        format="dense",
        values=values,
        layers={},
        kept_dense={},
        notes=notes,
        linears_dense_bytes=0,
        linears_packed_bytes=0,
        source_bytes=read,
        dense_bytes=written,
        packed_bytes=written,
        seconds=time.perf_counter() - started,
    )
