"""From a pruned model directory to a packed one: every mask verified, one shard in memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from secateur.artifact import Artifact, Manifest, library_versions, refuse_existing
from secateur.bits import unpack_mask
from secateur.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    file_sha256,
    save_tensors,
    write_index,
    write_json,
)
from secateur.compile.packed import (
    BITMASK,
    VALUES,
    PackedConfig,
    PackedLayer,
    encode,
    open_safely,
)
from secateur.compile.values import VALUE_TYPES, check_value_type, convert, with_dtype
from secateur.errors import ModelError
from secateur.model import ARCHITECTURES
from secateur.pattern import Pattern
from secateur.recipe import ValueType

MASKS = "masks.safetensors"
_PRUNE_AGAIN = "prune the model again with `secateur prune`"


class LayerReport(BaseModel):
    """Size of one packed linear, in bytes; dense means in the same value type, without a bias."""

    shape: tuple[int, int]
    pattern: str
    kept: int
    dense_bytes: int
    packed_bytes: int
    ratio: float


class PackReport(BaseModel):
    """What `pack_model` made.

    Attributes:
        output: the packed directory.
        values: type of the stored weights; None: as they were.
        layers: the packed linears by module name.
        kept_dense: the linears left dense by pruning, and why.
        linears_dense_bytes, linears_packed_bytes: sums over `layers`.
        source_bytes: the weights of the pruned model as they were stored.
        dense_bytes: the weights of the pruned model in the value types of the output.
        packed_bytes: the weights of the output, everything included.
        seconds: wall time.
    """

    output: str
    format: str = "packed"
    values: ValueType | None
    layers: dict[str, LayerReport]
    kept_dense: dict[str, str]
    linears_dense_bytes: int
    linears_packed_bytes: int
    source_bytes: int
    dense_bytes: int
    packed_bytes: int
    seconds: float


def pack_model(
    pruned: str | Path,
    output: str | Path,
    *,
    values: ValueType | None = None,
    overwrite: bool = False,
) -> PackReport:
    """Pack a pruned model directory.

    Args:
        pruned: directory written by `secateur prune`.
        output: directory to make; it appears whole or not at all.
        values: convert all floating-point weights of the model to this type; None keeps them.
        overwrite: replace an existing output.

    Raises:
        ModelError: the input is not a pruned model, or a mask, a pattern and the weights
            contradict each other, or a value does not fit ``values``; names the tensor.
        UsageError: the output exists, or ``values`` is unknown.
    """
    started = time.perf_counter()
    check_value_type(values)
    refuse_existing(Path(output), overwrite)  # before hashing, not after it
    source = Checkpoint(pruned)
    facts = Manifest.read(pruned)
    if facts.kind != "pruned":
        raise ModelError(f"{pruned} is a {facts.kind} model, not a pruned one", _PRUNE_AGAIN)
    _refuse_other_modules(source, facts)
    hashes = source.sha256() | {MASKS: _masks_sha256(source.path)}
    identity = {"kind": "packed", "format": "packed", "values": values, "source": hashes}
    with Artifact(output, identity, overwrite) as artifact:
        try:
            packer = _Packer(source, facts, values)
            for file in source.files:
                save_tensors(artifact.path / file.name, packer.shard(file))
            if (source.path / INDEX).exists():
                write_index(artifact.path, [artifact.path / file.name for file in source.files])
            report = packer.report(Path(output))
            write_json(artifact.path / CONFIG, packer.config())
            for companion in source.companions():
                shutil.copyfile(companion, artifact.path / companion.name)
            manifest = Manifest(
                kind="packed",
                versions=library_versions("torch", "safetensors"),
                source={"kind": "pruned", "files": hashes, "source": facts.source},
                recipe=facts.recipe | {"compile": {"format": "packed", "values": values}},
                seed=facts.seed,
                layers=packer.facts,
                notes=facts.notes,
            )
        except BaseException:  # nothing here is worth resuming: leave no partial output either
            shutil.rmtree(artifact.path, ignore_errors=True)
            raise
        artifact.commit(manifest, {"compile": {"seconds": time.perf_counter() - started}})
    return report.model_copy(update={"seconds": time.perf_counter() - started})


def _refuse_other_modules(source: Checkpoint, facts: Manifest) -> None:
    """The packed form is read back into ``torch.nn.Linear`` modules of the same names."""
    kind = source.config.get("model_type", "")
    architecture = ARCHITECTURES.get(kind)
    renamed = architecture is not None and (architecture.experts or architecture.stored)
    if renamed or any(layer.transposed for layer in facts.layers.values()):
        raise ModelError(
            f"{kind} models cannot be packed: transformers holds their weights fused, transposed, "
            "or under other names",
            "use the pruned directory as it is; it is an ordinary model with zeros in place",
        )


def _masks_sha256(directory: Path) -> str:
    if not (directory / MASKS).is_file():
        raise ModelError(
            f"{directory} has no {MASKS}: it is not a pruned model, or was copied in part",
            "make it with `secateur prune`, or copy the whole directory",
        )
    return file_sha256(directory / MASKS)


class _Packer:
    """Packs shard after shard and keeps count of what became of each layer."""

    def __init__(self, source: Checkpoint, pruned: Manifest, values: ValueType | None) -> None:
        self.source = source
        self.values = values
        self.layers: dict[str, PackedLayer] = {}
        self.reports: dict[str, LayerReport] = {}
        self.facts = dict(pruned.layers)
        self.kept_dense = {
            name: layer.kept_dense or "its pattern is dense"
            for name, layer in pruned.layers.items()
            if layer.kept_dense is not None or layer.pattern == "dense"
        }
        self.patterns = {
            name: Pattern.parse(layer.pattern)
            for name, layer in pruned.layers.items()
            if name not in self.kept_dense
        }
        self.value_type: ValueType | None = values  # until the first packed linear tells it
        self.dense_bytes = self.packed_bytes = 0
        self.masks = open_safely(source.path / MASKS)
        self._check_names()

    def _check_names(self) -> None:
        """Manifest, masks and weights must speak of the same linears."""
        masked = {tensor.removesuffix(".weight") for tensor in self.masks.keys()}  # noqa: SIM118
        for name in self.patterns:
            if name not in masked:
                raise ModelError(
                    f"{MASKS} has no mask {name + '.weight'!r}, which the manifest calls pruned",
                    _PRUNE_AGAIN,
                )
            if name + ".weight" not in self.source:
                raise ModelError(f"the model has no tensor {name + '.weight'!r}", _PRUNE_AGAIN)
        if stray := sorted(masked - self.patterns.keys()):
            raise ModelError(
                f"{MASKS} has a mask {stray[0] + '.weight'!r}, which the manifest does not "
                "call pruned",
                _PRUNE_AGAIN,
            )
        if not self.patterns:
            raise ModelError(f"{self.source.path} has no pruned layer to pack", _PRUNE_AGAIN)

    def shard(self, file: Path) -> dict[str, torch.Tensor]:
        """The tensors that take the place of those of one source file."""
        stored = {}
        with open_safely(file) as handle:
            names = sorted(handle.keys())
        for tensor in names:
            weight = convert(tensor, self.source.load(tensor), self.values)
            self.dense_bytes += weight.nbytes
            layer = tensor.removesuffix(".weight")
            if tensor.endswith(".weight") and layer in self.patterns:
                stored[layer + BITMASK], stored[layer + VALUES] = self._pack(layer, weight)
            else:
                stored[tensor] = weight
                if tensor.endswith(".weight") and layer in self.facts:
                    size = {"dense_bytes": weight.nbytes, "bytes": weight.nbytes}
                    self.facts[layer] = self.facts[layer].model_copy(update=size)
        self.packed_bytes += sum(tensor.nbytes for tensor in stored.values())
        return stored

    def _pack(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = VALUE_TYPES.get(weight.dtype)
        self.value_type = self.value_type or found
        if found is None or found != self.value_type:
            raise ModelError(
                f"tensor {name + '.weight'!r} is {str(weight.dtype).removeprefix('torch.')}; "
                f"packed weights are all {self.value_type or 'fp32, bf16 or fp16'}",
                "convert the whole model with --values fp32, bf16 or fp16",
            )
        mask = self._mask(name, weight)
        layer, bitmask, values = encode(weight, mask, self.patterns[name])
        size = bitmask.nbytes + values.nbytes
        self.layers[name] = layer
        self.reports[name] = LayerReport(
            shape=layer.shape,
            pattern=str(layer.pattern),
            kept=layer.kept,
            dense_bytes=weight.nbytes,
            packed_bytes=size,
            ratio=size / weight.nbytes,
        )
        self.facts[name] = self.facts[name].model_copy(
            update={
                "dense_bytes": weight.nbytes,
                "bytes": size,
                "sparsity": 1 - layer.kept / weight.numel(),
            }
        )
        return bitmask, values

    def _mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The mask of a linear, verified against its pattern and its weights."""
        tensor, pattern = name + ".weight", self.patterns[name]
        if weight.ndim != 2:
            raise ModelError(f"tensor {tensor!r} has {weight.ndim} axes, not 2", _PRUNE_AGAIN)
        rows, columns = weight.shape
        bits = self.masks.get_tensor(tensor)
        try:
            if bits.ndim == 2 and bits.shape[0] * pattern.rows != rows:
                raise ValueError(f"{bits.shape[0]} rows of bits for {rows} rows of {pattern}")
            mask = unpack_mask(bits, columns, pattern.rows)
            pattern.check(mask)
        except ValueError as fault:
            raise ModelError(
                f"the mask of {tensor!r} is not valid: {fault}", _PRUNE_AGAIN
            ) from fault
        if (alive := (weight != 0) & ~mask).any():
            row, column = (int(i) for i in alive.nonzero()[0])
            raise ModelError(
                f"tensor {tensor!r} is {float(weight[row, column]):g} at row {row}, column "
                f"{column}, which its mask removes",
                _PRUNE_AGAIN,
            )
        return mask

    def config(self) -> dict[str, Any]:
        """``config.json`` of the packed model."""
        assert self.value_type is not None
        config = with_dtype(self.source.config, self.values)
        packed = PackedConfig(values=self.value_type, layers=dict(sorted(self.layers.items())))
        return config | {"quantization_config": packed.model_dump(mode="json")}

    def report(self, output: Path) -> PackReport:
        """Sizes of everything."""
        assert self.value_type is not None
        return PackReport(
            output=str(output),
            values=self.value_type,
            layers=self.reports,
            kept_dense=self.kept_dense,
            linears_dense_bytes=sum(layer.dense_bytes for layer in self.reports.values()),
            linears_packed_bytes=sum(layer.packed_bytes for layer in self.reports.values()),
            source_bytes=sum(self.source.nbytes(name) for name in self.source.names()),
            dense_bytes=self.dense_bytes,
            packed_bytes=self.packed_bytes,
            seconds=0.0,
        )
