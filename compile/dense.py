"""The format ``dense``: plain Hugging Face weights, in another value type if one is asked for.

It is the control of every measurement (the dense twin of a packed model, in the same value type),
and the way back from a packed model for programs that know nothing of it.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from secateur.artifact import Artifact, Manifest, library_versions, refuse_existing
from secateur.checkpoint import CONFIG, INDEX, Checkpoint, TensorWriter, write_index, write_json
from secateur.compile.config import LIMITS, QUANT_METHOD, VALUES
from secateur.compile.orphan import OrphanCheckpoint
from secateur.compile.packed import PackedModel, read_packed
from secateur.compile.report import PackReport
from secateur.compile.values import VALUE_TYPES, check_value_type, convert, dtype_of, with_dtype
from secateur.errors import UsageError
from secateur.recipe import ValueType


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
    source = Checkpoint(model)
    quantization = source.config.get("quantization_config", {})
    packed = read_packed(model) if quantization.get("quant_method") == QUANT_METHOD else None
    if packed is None:
        source = OrphanCheckpoint(model)
    hashes = source.sha256()
    recipe = {"compile": {"format": "dense", "values": values}}
    stored = read = 0
    with Artifact(output, {"source": hashes, **recipe}, overwrite) as artifact:
        for file in source.files:
            with TensorWriter(artifact.path / file.name) as writer:
                for name in packed.names() if packed else source.names():
                    if _home(name, source) == file:
                        weight, wanted = _read(name, source, packed, values)
                        converted = convert(name, weight, wanted)
                        read += weight.nbytes
                        stored += converted.nbytes
                        writer.add(name, converted)
        if (source.path / INDEX).exists():
            write_index(artifact.path, [artifact.path / file.name for file in source.files])
        config = with_dtype(source.config, values)
        if packed:
            del config["quantization_config"]
        write_json(artifact.path / CONFIG, config)
        for companion in source.companions():
            shutil.copyfile(companion, artifact.path / companion.name)
        manifest = Manifest(
            kind="dense",
            versions=library_versions("torch", "safetensors"),
            source={"sha256": hashes},
            recipe=recipe,
            layers={},
        )
        artifact.commit(manifest, {"compile": {"seconds": time.perf_counter() - started}})
    return PackReport(
        output=str(output),
        format="dense",
        values=values,
        layers={},
        kept_dense={},
        linears_dense_bytes=0,
        linears_packed_bytes=0,
        source_bytes=read,
        dense_bytes=stored,
        packed_bytes=stored,
        seconds=time.perf_counter() - started,
    )


def _read(
    name: str, source: Checkpoint, packed: PackedModel | None, values: ValueType | None
) -> tuple[torch.Tensor, ValueType | None]:
    """A dense tensor, of integers and fp8 as fp32, and the type that it is to have."""
    named = VALUE_TYPES[dtype_of(source.config)]
    if packed is not None and packed.config.values in LIMITS:
        expanded = name.removesuffix(".weight") in packed.layers
        return packed.load(name, torch.float32), values or (named if expanded else None)
    if packed is not None:
        return packed.load(name), values
    assert isinstance(source, OrphanCheckpoint)
    return source.load(name), values or (named if source.has_scale(name) else None)


def _home(name: str, source: Checkpoint) -> Path:
    """The file that holds a dense tensor, or its packed form."""
    return source.file_of(name if name in source else name.removesuffix(".weight") + VALUES)
