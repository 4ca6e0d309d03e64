"""From a pruned model directory to a packed one: every mask verified, one shard in memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

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
from secateur.compile.calibrate import FOLDER, Blocks, Quantizer, usual_text
from secateur.compile.config import BITMASK, LIMITS, SCALES, VALUES, PackedConfig, PackedLayer
from secateur.compile.packed import encode
from secateur.compile.report import LayerReport, PackReport
from secateur.compile.stored import open_safely
from secateur.compile.values import VALUE_TYPES, check_value_type, convert, with_dtype
from secateur.errors import ModelError
from secateur.model import ARCHITECTURES
from secateur.pattern import Pattern
from secateur.recipe import Calibration, Compile, ValueType, validate

MASKS = "masks.safetensors"
_PRUNE_AGAIN = "prune the model again with `secateur prune`"


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
    """Pack a pruned model directory.

    Integer values are for the linears of the blocks, also for those that pruning left dense; all
    other weights stay as they are. The same arguments give the same bytes, and a quantising run
    that was cut off goes on after its last block when it is repeated.

    Args:
        pruned: directory written by `secateur prune`.
        output: directory to make; it appears whole or not at all.
        values: fp32, bf16, fp16: convert all floating-point weights of the model to this type;
            int8, int4: quantise; None: leave the weights as they are.
        group_size: int8, int4: columns that share a scale: 32, 64 or 128.
        quantize: int8, int4: gptq, or rtn (round to nearest).
        calibration: the text that gptq reads; None: that of the pruning, if it is at hand, else
            'self'. rtn reads one only to measure its errors; None: it measures none.
        device: where gptq computes: auto, cpu, cuda or cuda:N.
        overwrite: replace an existing output.
        quiet: show no progress.

    Raises:
        ModelError: the input is not a pruned model, or a mask, a pattern and the weights
            contradict each other, or a value does not fit ``values``; names the tensor. Or the
            text cannot be read.
        UsageError: the output exists, or an argument has an unknown value.
    """
    started = time.perf_counter()
    check_value_type(values)
    chosen = {"values": values, "group_size": group_size, "quantize": quantize, "device": device}
    settings = validate(Compile, chosen, "compile")
    refuse_existing(Path(output), overwrite)  # before hashing, not after it
    source = Checkpoint(pruned)
    facts = Manifest.read(pruned)
    if facts.kind != "pruned":
        raise ModelError(f"{pruned} is a {facts.kind} model, not a pruned one", _PRUNE_AGAIN)
    _refuse_other_modules(source, facts)
    if values not in LIMITS:
        calibration = None
    elif calibration is None and quantize == "gptq":
        calibration = Calibration(data=usual_text(facts.recipe))
    recipe = {"compile": recorded(settings, calibration)}
    hashes = source.sha256() | {MASKS: _masks_sha256(source.path)}
    identity = {"kind": "packed", "source": hashes, **recipe}
    with Artifact(output, identity, overwrite) as artifact:
        packer = None
        try:
            packer = _Packer(source, facts, settings, calibration)
            packer.quantise(artifact.path / FOLDER, quiet)
            for file in source.files:
                save_tensors(artifact.path / file.name, packer.shard(file))
            shutil.rmtree(artifact.path / FOLDER, ignore_errors=True)
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
                recipe=facts.recipe | recipe,
                seed=facts.seed,
                layers=packer.facts,
                notes=facts.notes,
            )
        except BaseException:  # keep only what is worth resuming
            if packer is None or packer.blocks is None or not packer.blocks.begun:
                shutil.rmtree(artifact.path, ignore_errors=True)
            raise
        artifact.commit(manifest, {"compile": {"seconds": time.perf_counter() - started}})
    return report.model_copy(update={"seconds": time.perf_counter() - started})


def recorded(settings: Compile, calibration: Calibration | None) -> dict[str, Any]:
    """What the manifest's recipe says of a compilation: all that decides its result."""
    kept: dict[str, Any] = {"format": "packed", "values": settings.values}
    if settings.values in LIMITS:
        kept |= {"group_size": settings.group_size, "quantize": settings.quantize}
        kept |= {"calibration": calibration.model_dump() if calibration else None}
    return kept


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

    def __init__(
        self,
        source: Checkpoint,
        pruned: Manifest,
        settings: Compile,
        calibration: Calibration | None,
    ) -> None:
        self.source = source
        self.settings = settings
        self.calibration = calibration
        self.values = values = settings.values
        self.quantizer: Quantizer | None = None
        self.blocks: Blocks | None = None
        if values in LIMITS:
            self.quantizer = Quantizer(values, settings.group_size, settings.quantize)
        self.layers: dict[str, PackedLayer] = {}
        self.reports: dict[str, LayerReport] = {}
        self.facts = dict(pruned.layers)
        self.kept_dense = {
            name: layer.kept_dense or "its pattern is dense"
            for name, layer in pruned.layers.items()
            if layer.kept_dense is not None or layer.pattern == "dense"
        }
        self.patterns = {
            name: Pattern() if name in self.kept_dense else Pattern.parse(layer.pattern)
            for name, layer in pruned.layers.items()
            if self.quantizer is not None or name not in self.kept_dense
        }
        self.value_type: ValueType | None = values  # until the first packed linear tells it
        self.dense_bytes = self.packed_bytes = 0
        self.masks = open_safely(source.path / MASKS)
        self._check_names()

    def _check_names(self) -> None:
        """Manifest, masks and weights must speak of the same linears."""
        masked = {tensor.removesuffix(".weight") for tensor in self.masks.keys()}  # noqa: SIM118
        for name, pattern in self.patterns.items():
            if name not in masked and not pattern.is_dense:
                raise ModelError(
                    f"{MASKS} has no mask {name + '.weight'!r}, which the manifest calls pruned",
                    _PRUNE_AGAIN,
                )
            if name + ".weight" not in self.source:
                raise ModelError(f"the model has no tensor {name + '.weight'!r}", _PRUNE_AGAIN)
        if stray := sorted(masked - (self.patterns.keys() - self.kept_dense.keys())):
            raise ModelError(
                f"{MASKS} has a mask {stray[0] + '.weight'!r}, which the manifest does not "
                "call pruned",
                _PRUNE_AGAIN,
            )
        if not self.patterns:
            raise ModelError(f"{self.source.path} has no pruned layer to pack", _PRUNE_AGAIN)

    def quantise(self, folder: Path, quiet: bool) -> None:
        """Take the walk that quantising takes, if it takes one."""
        if self.quantizer is not None and self.calibration is not None:
            self.blocks = Blocks(folder, self.source, self.patterns)
            text, device = self.calibration, self.settings.device
            self.blocks.run(self.quantizer, text, self._mask_of, device, quiet)

    def shard(self, file: Path) -> dict[str, torch.Tensor]:
        """The tensors that take the place of those of one source file."""
        stored: dict[str, torch.Tensor] = {}
        with open_safely(file) as handle:
            names = sorted(handle.keys())
        for tensor in names:
            weight = convert(tensor, self.source.load(tensor), self.values)
            layer = tensor.removesuffix(".weight")
            if tensor.endswith(".weight") and layer in self.patterns:
                pack = self._pack if self.quantizer is None else self._pack_integers
                stored |= {layer + end: piece for end, piece in pack(layer, weight).items()}
                self.dense_bytes += self.reports[layer].dense_bytes
                continue
            stored[tensor] = weight
            self.dense_bytes += weight.nbytes
            if tensor.endswith(".weight") and layer in self.facts:
                size = {"dense_bytes": weight.nbytes, "bytes": weight.nbytes}
                self.facts[layer] = self.facts[layer].model_copy(update=size)
        self.packed_bytes += sum(tensor.nbytes for tensor in stored.values())
        return stored

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
        layer, bitmask, values = encode(weight, self._mask(name, weight), self.patterns[name])
        tensors = {BITMASK: bitmask, VALUES: values}
        self._note(name, layer, weight.nbytes, tensors, {})
        return tensors

    def _pack_integers(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a linear with integer values: from the walk, or rounded here."""
        assert self.quantizer is not None
        if self.blocks is not None:
            solved = self.blocks.load(name)
        else:
            mask, pattern = self._mask(name, weight), self.patterns[name]
            solved = self.quantizer.solve(name, weight.float(), mask, pattern, None)
        bits = 4 if self.values == "int4" else 8
        dense = -(-weight.numel() * bits // 8) + solved.tensors[SCALES].nbytes
        self._note(name, solved.layer, dense, solved.tensors, {"quantize": solved.facts})
        return solved.tensors

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
        return self._mask(name, convert(name + ".weight", weight, None))

    def _mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The mask of a linear, verified against its pattern and its weights."""
        tensor, pattern = name + ".weight", self.patterns[name]
        if weight.ndim != 2:
            raise ModelError(f"tensor {tensor!r} has {weight.ndim} axes, not 2", _PRUNE_AGAIN)
        if pattern.is_dense:
            return torch.ones_like(weight, dtype=torch.bool)
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
        layers = dict(sorted(self.layers.items()))
        packed = PackedConfig.of(self.value_type, self.settings.group_size, layers)
        return config | {"quantization_config": packed.model_dump(mode="json")}

    def report(self, output: Path) -> PackReport:
        """Sizes of everything."""
        assert self.value_type is not None
        quantised = self.quantizer is not None
        return PackReport(
            output=str(output),
            values=self.value_type,
            group_size=self.settings.group_size if quantised else None,
            quantize=self.settings.quantize if quantised else None,
            calibration=self.calibration,
            calibration_tokens=self.blocks.tokens if self.blocks else None,
            layers=self.reports,
            kept_dense=self.kept_dense,
            linears_dense_bytes=sum(layer.dense_bytes for layer in self.reports.values()),
            linears_packed_bytes=sum(layer.packed_bytes for layer in self.reports.values()),
            source_bytes=sum(self.source.nbytes(name) for name in self.source.names()),
            dense_bytes=self.dense_bytes,
            packed_bytes=self.packed_bytes,
            seconds=0.0,
        )
