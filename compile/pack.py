"""From a pruned model directory, or an orphaned checkpoint, to a packed one, tensor by tensor."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from secateur.artifact import Artifact, Manifest, library_versions, refuse_existing
from secateur.checkpoint import CONFIG, write_json
from secateur.compile.calibrate import FOLDER, Blocks, Quantizer, usual_text
from secateur.compile.config import BITMASK, LIMITS, SCALES, VALUES, PackedConfig, PackedLayer
from secateur.compile.orphan import GROUP
from secateur.compile.packed import encode, encode_integers
from secateur.compile.report import LayerReport, PackReport
from secateur.compile.shards import write_shards
from secateur.compile.sources import Source, open_source
from secateur.compile.values import (
    VALUE_TYPES,
    check_value_type,
    convert,
    dtype_of,
    with_dtype,
)
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.recipe import Calibration, Compile, ValueType, validate


def pack_model(
    pruned: str | Path,
    output: str | Path,
    *,
    values: ValueType | None = None,
    group_size: int = 64,
    quantize: str = "gptq",
    calibration: Calibration | None = None,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> PackReport:
    """Pack a pruned model directory, or a sparse checkpoint of another program.

    Integer values are for the linears of the blocks, also for those that pruning left dense; all
    other weights stay as they are. The same arguments give the same bytes, and a quantising run
    that was cut off goes on after its last block when it is repeated.

    Args:
        pruned: directory written by `secateur prune`, or one that `OrphanCheckpoint` reads: its
            patterns are those of its zeros.
        output: directory to make; it appears whole or not at all.
        values: fp32, bf16, fp16: convert all floating-point weights of the model to this type;
            int8, int4, fp8: quantise; None: leave the weights as they are. Integers and fp8 of an
            orphan stay what they are if none has to be rounded; else their products with the scales
            become the type that its config names.
        group_size: int8, int4: columns that share a scale: 32, 64 or 128.
        quantize: int8, int4, fp8: gptq, or rtn (round to nearest).
        calibration: the text that gptq reads; None: that of the pruning, if it is at hand, else
            'self'. rtn reads one only to measure its errors; None: it measures none.
        device: where gptq computes: auto, cpu, cuda or cuda:N.
        overwrite: replace an existing output.
        quiet: show no progress.

    Raises:
        ModelError: the input is not a pruned model, or a mask, a pattern and the weights
            contradict each other, or a value does not fit ``values``; names the tensor. Or the
            text cannot be read.
        UsageError: the output exists, an argument has an unknown value, or an orphan is to write
            its own text.
    """
    started = time.perf_counter()
    check_value_type(values)
    chosen = {"values": values, "group_size": group_size, "quantize": quantize, "device": device}
    settings = validate(Compile, chosen, "compile")
    refuse_existing(Path(output), overwrite)  # before hashing, not after it
    source = open_source(pruned)
    if values not in LIMITS:
        calibration = None
        if values is None and source.values is not None:
            settings = settings.model_copy(update={"values": source.values, "group_size": GROUP})
    elif calibration is None and quantize == "gptq":
        calibration = Calibration(data=usual_text(source.recipe))
    if calibration is not None and calibration.data == "self" and source.kind == "orphan":
        raise UsageError(
            f"{pruned} cannot write its own calibration text: no engine runs it as it is",
            "name a text with --data (pydoc needs no file), or use --quantize rtn",
        )
    keep = values is None and source.values is not None
    recipe = {"compile": recorded(settings, calibration, keep)}
    origin = source.provenance()
    identity = {"kind": "packed", "source": origin["files"], **recipe}
    with Artifact(output, identity, overwrite) as artifact:
        packer = None
        try:
            packer = _Packer(source, settings, calibration, keep)
            packer.quantise(artifact.path / FOLDER, quiet)
            packer.source_bytes, packer.packed_bytes = write_shards(
                artifact.path, source.checkpoint, packer.stored
            )
            shutil.rmtree(artifact.path / FOLDER, ignore_errors=True)
            report = packer.report(Path(output))
            write_json(artifact.path / CONFIG, packer.config())
            manifest = Manifest(
                kind="packed",
                versions=library_versions("torch", "safetensors"),
                source=origin,
                recipe=source.recipe | recipe,
                seed=source.seed,
                layers=packer.facts,
                notes=report.notes,
            )
        except BaseException:  # keep only what is worth resuming
            if packer is None or packer.blocks is None or not packer.blocks.begun:
                shutil.rmtree(artifact.path, ignore_errors=True)
            raise
        artifact.commit(manifest, {"compile": {"seconds": time.perf_counter() - started}})
    return report.model_copy(update={"seconds": time.perf_counter() - started})


def recorded(
    settings: Compile, calibration: Calibration | None, keep: bool = False
) -> dict[str, Any]:
    """What the manifest's recipe says of a compilation: all that decides its result.

    Args:
        settings, calibration: as of the command.
        keep: the values are those of the source.
    """
    kept: dict[str, Any] = {"format": "packed", "values": settings.values}
    if settings.values in LIMITS:
        grouped = {} if settings.values == "fp8" else {"group_size": settings.group_size}
        kept |= grouped | {"quantize": settings.quantize}
        kept |= {"calibration": calibration.model_dump() if calibration else None}
    return kept | {"quantize": "kept"} if keep else kept


class _Packer:
    """Packs shard after shard and keeps count of what became of each layer."""

    def __init__(
        self, source: Source, settings: Compile, calibration: Calibration | None, keep: bool
    ) -> None:
        self.source = source
        self.settings = settings
        self.calibration = calibration
        self.values = values = settings.values
        self.keep = keep
        self.quantizer: Quantizer | None = None
        self.blocks: Blocks | None = None
        if values in LIMITS:
            size = None if values == "fp8" else settings.group_size
            self.quantizer = Quantizer(values, size, settings.quantize)
        self.layers: dict[str, PackedLayer] = {}
        self.reports: dict[str, LayerReport] = {}
        self.facts = dict(source.layers)
        self.patterns = dict(source.patterns)
        if keep:
            integers = [name for name in source.layers if source.decoded(name + ".weight")]
            self.patterns = {name: source.patterns.get(name, Pattern()) for name in integers}
        elif self.quantizer is not None:
            self.patterns |= {name: Pattern() for name in source.kept_dense}
        self.value_type: ValueType | None = values  # until the first packed linear tells it
        self.source_bytes = self.dense_bytes = self.packed_bytes = 0
        self.rounding: list[float] = []
        if not self.patterns:
            why = next(iter(source.kept_dense.items()), None)
            said = f"; {why[0]} is not: {why[1]}" if why else ""
            raise ModelError(
                f"{source.checkpoint.path} has no pruned layer to pack{said}",
                "prune it with `secateur prune`, quantise it with --values int8, or convert it "
                "with --format dense",
            )

    def quantise(self, folder: Path, quiet: bool) -> None:
        """Take the walk that quantising takes, if it takes one."""
        if self.quantizer is not None and self.calibration is not None:
            self.blocks = Blocks(folder, self.source.checkpoint, self.patterns)
            text, device = self.calibration, self.settings.device
            self.blocks.run(self.quantizer, text, self._mask_of, device, quiet)

    def stored(self, tensor: str) -> dict[str, torch.Tensor]:
        """What takes the place of a tensor of the dense model, by name."""
        layer = tensor.removesuffix(".weight")
        if tensor.endswith(".weight") and layer in self.patterns:
            stored = self._layer(layer, tensor)
            self.dense_bytes += self.reports[layer].dense_bytes
            return stored
        weight = self._converted(tensor)
        self.dense_bytes += weight.nbytes
        if tensor.endswith(".weight") and layer in self.facts:
            size = {"dense_bytes": weight.nbytes, "bytes": weight.nbytes}
            self.facts[layer] = self.facts[layer].model_copy(update=size)
        return {tensor: weight}

    def _layer(self, name: str, tensor: str) -> dict[str, torch.Tensor]:
        """The tensors of a packed linear by their names."""
        if self.keep:
            parts = self._keep_integers(name)
        else:
            pack = self._pack if self.quantizer is None else self._pack_integers
            parts = pack(name, self._converted(tensor))
        return {name + end: piece for end, piece in parts.items()}

    def _converted(self, tensor: str) -> torch.Tensor:
        """A tensor in the wanted type; what has scales becomes the type that the config names."""
        weight = self.source.checkpoint.load(tensor)
        wanted = self.values
        named = VALUE_TYPES[dtype_of(self.source.checkpoint.config)]
        if self.source.decoded(tensor) and (wanted is None or self.keep):
            wanted = named
        converted = convert(tensor, weight, wanted)
        if self.source.decoded(tensor) and converted.dtype != weight.dtype:
            lost = (converted.float() - weight).norm() / weight.norm().clamp_min(1e-30)
            self.rounding.append(float(lost))
        return converted

    def _pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a linear with floating-point values, by the end of their names."""
        found = VALUE_TYPES.get(weight.dtype)
        self.value_type = self.value_type or found
        if found is None or found != self.value_type:
            raise ModelError(
                f"tensor {name + '.weight'!r} is {str(weight.dtype).removeprefix('torch.')}; "
                f"packed weights are all {self.value_type or 'fp32, bf16 or fp16'}",
                "convert the whole model with --values fp32, bf16 or fp16",
            )
        mask = self.source.mask(name, weight)
        layer, bitmask, values = encode(weight, mask, self.patterns[name])
        tensors = {BITMASK: bitmask, VALUES: values}
        self._note(name, layer, weight.nbytes, tensors, {})
        return tensors

    def _pack_integers(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a linear with scales: from the walk, or rounded here."""
        assert self.quantizer is not None
        if self.blocks is not None:
            solved = self.blocks.load(name)
        else:
            mask, pattern = self.source.mask(name, weight), self.patterns[name]
            solved = self.quantizer.solve(name, weight.float(), mask, pattern, None)
        bits = 4 if self.values == "int4" else 8
        dense = -(-weight.numel() * bits // 8) + solved.tensors[SCALES].nbytes
        self._note(name, solved.layer, dense, solved.tensors, {"quantize": solved.facts})
        return solved.tensors

    def _keep_integers(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a linear whose values and scales are those of the source."""
        assert self.values is not None
        found = self.source.integers(name)
        assert found is not None
        mask, pattern = self.source.mask(name, found.values), self.patterns[name]
        layer, tensors = encode_integers(found, mask, pattern, self.values)
        bits = 4 if self.values == "int4" else 8
        dense = -(-found.values.numel() * bits // 8) + tensors[SCALES].nbytes
        self._note(name, layer, dense, tensors, {"quantize": {"method": "kept"}})
        return tensors

    def _note(
        self,
        name: str,
        layer: PackedLayer,
        dense_bytes: int,
        tensors: dict[str, torch.Tensor],
        steps: dict[str, Any],
    ) -> None:
        size, facts = sum(tensor.nbytes for tensor in tensors.values()), self.facts[name]
        measured = steps.get("quantize", {})
        self.layers[name] = layer
        self.reports[name] = LayerReport(
            shape=layer.shape,
            pattern=str(layer.pattern),
            kept=layer.kept,
            dense_bytes=dense_bytes,
            packed_bytes=size,
            ratio=size / dense_bytes,
            quantization_error=measured.get("relative_error"),
            activation_error=measured.get("activation_error"),
        )
        update = {
            "dense_bytes": dense_bytes,
            "bytes": size,
            "sparsity": 1 - layer.kept / (layer.shape[0] * layer.shape[1]),
            "steps": facts.steps | steps,
        }
        self.facts[name] = facts.model_copy(update=update)

    def _mask_of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The verified mask of a linear, given its weight as stored."""
        return self.source.mask(name, convert(name + ".weight", weight, None))

    def config(self) -> dict[str, Any]:
        """``config.json`` of the packed model."""
        assert self.value_type is not None
        config = with_dtype(self.source.checkpoint.config, self.values)
        layers = dict(sorted(self.layers.items()))
        packed = PackedConfig.of(self.value_type, self.settings.group_size, layers)
        return config | {"quantization_config": packed.model_dump(mode="json")}

    def report(self, output: Path) -> PackReport:
        """Sizes of everything."""
        assert self.value_type is not None
        return PackReport(
            output=str(output),
            values=self.value_type,
            group_size=self.quantizer.group_size if self.quantizer else None,
            quantize=self._method(),
            calibration=self.calibration,
            calibration_tokens=self.blocks.tokens if self.blocks else None,
            layers=self.reports,
            kept_dense=self.source.kept_dense,
            notes=self._notes(),
            linears_dense_bytes=sum(layer.dense_bytes for layer in self.reports.values()),
            linears_packed_bytes=sum(layer.packed_bytes for layer in self.reports.values()),
            source_bytes=self.source_bytes,
            dense_bytes=self.dense_bytes,
            packed_bytes=self.packed_bytes,
            seconds=0.0,
        )

    def _method(self) -> str | None:
        if self.quantizer is None:
            return None
        return "kept" if self.keep else self.settings.quantize

    def _notes(self) -> list[str]:
        """The notes of the source, and what was lost."""
        notes = list(self.source.notes)
        if self.source.loss is not None and self.quantizer is None:
            notes.append(self.source.loss)
        if self.rounding:
            notes.append(
                f"{len(self.rounding)} weights are products with their scales, rounded: relative "
                f"error {max(self.rounding):.1e} at most"
            )
        return notes
