"""The directory around weights in another program's form: conversion, counting, manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.artifact import Artifact, LayerFacts, Manifest, library_versions
from secateur.checkpoint import CONFIG, Checkpoint, write_json
from secateur.compile.config import LIMITS
from secateur.compile.report import LayerReport, PackReport
from secateur.compile.shards import Stored, write_shards
from secateur.compile.sources import Source
from secateur.compile.values import VALUE_TYPES, convert, dtype_of, with_dtype
from secateur.errors import ModelError
from secateur.model import StreamedModel
from secateur.recipe import ValueType


@dataclass
class Export:
    """What the writers share: conversion, counting, and the directory around the weights."""

    source: Source
    format: str
    values: ValueType | None
    reports: dict[str, LayerReport] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # of the weights as they are stored

    @property
    def named(self) -> torch.dtype:
        """The type of the model's floats."""
        return dtype_of(self.source.checkpoint.config)

    def load(self, tensor: str, source: Source | None = None) -> torch.Tensor:
        """A dense tensor in the type that it is to have before it is quantised."""
        source = source or self.source
        named = VALUE_TYPES[self.named] if source.decoded(tensor) else None
        return convert(tensor, source.checkpoint.load(tensor), self.floats or named)

    @property
    def floats(self) -> ValueType | None:
        """The type that floating-point weights are converted to, if any."""
        return None if self.values in LIMITS else self.values

    def note(
        self, name: str, dense_bytes: int, parts: Mapping[str, torch.Tensor], kept: int
    ) -> None:
        """Count a linear."""
        size = sum(part.nbytes for part in parts.values())
        self.reports[name] = LayerReport(
            shape=self.source.layers[name].shape,
            pattern=str(self.source.patterns[name]),
            kept=kept,
            dense_bytes=dense_bytes,
            packed_bytes=size,
            ratio=size / dense_bytes,
        )

    def _facts(self, name: str) -> LayerFacts:
        """What the manifest says of a linear; one that is not sparse here has its plain size."""
        facts, report = self.source.layers[name], self.reports.get(name)
        if report is None:
            why = self.source.kept_dense.get(name)
            update: dict[str, Any] = {
                "bytes": self.sizes[name],
                "dense_bytes": self.sizes[name],
                "kept_dense": why,
            }
        else:
            update = {"bytes": report.packed_bytes, "dense_bytes": report.dense_bytes}
        return facts.model_copy(update=update)

    def sparsity(self) -> float:
        """The fraction of all linears' weights that the masks remove."""
        sizes = {
            name: layer.shape[0] * layer.shape[1] for name, layer in self.source.layers.items()
        }
        removed = sum(
            sizes[name] * self.source.patterns[name].removed for name in self.source.patterns
        )
        return float(removed / sum(sizes.values()))

    def write(
        self,
        output: Path,
        overwrite: bool,
        recipe: dict[str, Any],
        stored: Stored,
        config: Callable[[list[str]], dict[str, Any]],
        method: str,
    ) -> PackReport:
        """Make the directory.

        Args:
            output, overwrite: as of the writer.
            recipe: what decides the result, for the manifest.
            stored: what takes the place of each tensor of the dense model; calls `note`.
            config: ``quantization_config``, given the linears that were not noted.
            method: how integers and fp8 were found.
        """
        started = time.perf_counter()
        source, checkpoint = self.source, self.source.checkpoint
        if not source.patterns:
            raise ModelError(f"{checkpoint.path} has no pruned linear", "prune it first")
        recipe = {"compile": {"format": self.format, **recipe}}
        origin, notes = source.provenance(), list(source.notes)
        decoded = [name for name in source.layers if source.decoded(name + ".weight")]
        if decoded and method != "kept":
            named = VALUE_TYPES[self.named]
            notes.append(f"{len(decoded)} linears with scales became {self.floats or named} first")

        def counted(tensor: str) -> Mapping[str, torch.Tensor]:
            parts = stored(tensor)
            size = sum(part.nbytes for part in parts.values())
            self.sizes[tensor.removesuffix(".weight")] = size
            return parts

        with Artifact(output, {"source": origin["files"], **recipe}, overwrite) as artifact:
            read, written = write_shards(artifact.path, checkpoint, counted)
            ignored = [name for name in linears(checkpoint) if name not in self.reports]
            found = with_dtype(checkpoint.config, self.floats)
            write_json(artifact.path / CONFIG, found | {"quantization_config": config(ignored)})
            manifest = Manifest(
                kind="exported",
                versions=library_versions("torch", "safetensors"),
                source=origin,
                recipe=source.recipe | recipe,
                seed=source.seed,
                layers={name: self._facts(name) for name in source.layers},
                notes=notes,
            )
            seconds = time.perf_counter() - started
            artifact.commit(manifest, {"compile": {"seconds": seconds}})
        dense = sum(layer.dense_bytes for layer in self.reports.values())
        packed = sum(layer.packed_bytes for layer in self.reports.values())
        return PackReport(
            output=str(output),
            format=self.format,
            values=self.values,
            quantize=method if self.values is not None and self.floats is None else None,
            layers=self.reports,
            kept_dense=source.kept_dense,
            notes=notes,
            linears_dense_bytes=dense,
            linears_packed_bytes=packed,
            source_bytes=read,
            dense_bytes=written - packed + dense,
            packed_bytes=written,
            seconds=seconds,
        )


def linears(checkpoint: Checkpoint) -> list[str]:
    """The names of every ``torch.nn.Linear`` of a model, the output head among them."""
    model = StreamedModel(checkpoint, torch.device("cpu"), None)
    modules = model.module.named_modules()
    return [name for name, module in modules if isinstance(module, torch.nn.Linear)]
