"""The format ``onnx``: a decoder with KV cache for ONNX Runtime, its pruned weights stored small.

The directory holds ``model.onnx`` (the graph), ``model.onnx.data`` (the weights), config.json and
the tokenizer's files. FORMATS of the weights: see `secateur.compile.onnx.weights`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.artifact import Artifact, LayerFacts, Manifest, library_versions, refuse_existing
from secateur.checkpoint import CONFIG, write_json
from secateur.compile.config import LIMITS
from secateur.compile.onnx.environment import require
from secateur.compile.pack import pack_model
from secateur.compile.packed import PackedModel
from secateur.compile.quantize import Quantised
from secateur.compile.report import LayerReport, PackReport
from secateur.compile.sources import PackedSource, Source, open_source
from secateur.compile.values import VALUE_TYPES, check_value_type, convert, dtype_of, with_dtype
from secateur.errors import ModelError, UsageError, did_you_mean
from secateur.model import StreamedModel
from secateur.recipe import Calibration, ValueType

if TYPE_CHECKING:
    from secateur.compile.onnx.graph import Stored
    from secateur.compile.onnx.weights import Storage

GRAPH, DATA = "model.onnx", "model.onnx.data"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi3")
_EMBEDDINGS = "model.embed_tokens.weight"


def write_onnx(
    model: str | Path,
    output: str | Path,
    *,
    values: ValueType | None = None,
    onnx_weights: Storage = "bitmask",
    group_size: int = 64,
    quantize: str = "gptq",
    calibration: Calibration | None = None,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> PackReport:
    """Write a dense, pruned or packed model as ONNX.

    Args:
        model: the directory.
        output: directory to make; it appears whole or not at all.
        values: fp32, bf16 or fp16: type that weights are stored in (all is computed in fp32);
            int8 or int4: quantise the linears of the blocks; None: as they are.
        onnx_weights: how pruned linears are stored; see `secateur.compile.onnx.weights`.
        group_size, quantize, calibration, device, quiet: of int8 and int4, as of `pack_model`.
        overwrite: replace an existing output.

    Raises:
        ModelError: the model is damaged, of another family than `FAMILIES`, or too large for its
            storage.
        UsageError: the output exists, or the arguments do not go together.
        EnvironmentFault: a package of the extra ``onnx`` is missing.
    """
    require("onnx", "onnxscript", "onnxruntime")
    from secateur.compile.onnx.weights import STORAGES

    started = time.perf_counter()
    check_value_type(values)
    if onnx_weights not in STORAGES:
        raise UsageError(
            f"--onnx-weights {onnx_weights!r} is not known", did_you_mean(onnx_weights, STORAGES)
        )
    refuse_existing(Path(output), overwrite)
    staged = Path(f"{output}.integers")
    source = open_source(model, packed=True)
    stored = _integers_of(source)
    _check(source, onnx_weights, values or (stored.config.values if stored else None))
    method = None
    if stored is not None and values in (None, stored.config.values):
        method, values = "kept", stored.config.values
    elif values in LIMITS:
        options: dict[str, Any] = {"values": values, "group_size": group_size, "quiet": quiet}
        options |= {"quantize": quantize, "calibration": calibration, "device": device}
        pack_model(model, staged, overwrite=True, **options)
        source, method = open_source(staged, packed=True), quantize
    work = _Work(source, onnx_weights, values)
    chosen = {"format": "onnx", "values": values, "onnx_weights": onnx_weights}
    recipe = {"compile": chosen | {"quantize": method, "group_size": work.group}}
    origin = source.provenance()
    with Artifact(output, {"source": origin["files"], **recipe}, overwrite) as artifact:
        written = work.write(artifact.path)
        manifest = Manifest(
            kind="exported",
            versions=library_versions("torch", "transformers", "onnx", "onnxscript"),
            source=origin,
            recipe=source.recipe | recipe,
            seed=source.seed,
            layers={name: work.facts(name) for name in source.layers},
            notes=work.notes,
        )
        seconds = time.perf_counter() - started
        artifact.commit(manifest, {"compile": {"seconds": seconds}})
    read = sum(file.stat().st_size for file in source.checkpoint.files)
    shutil.rmtree(staged, ignore_errors=True)
    dense = sum(layer.dense_bytes for layer in work.reports.values())
    packed = sum(layer.packed_bytes for layer in work.reports.values())
    return PackReport(
        output=str(output),
        format="onnx",
        values=values,
        quantize=method,
        group_size=work.group,
        calibration=calibration if method not in ("kept", None) else None,
        layers=work.reports,
        kept_dense=source.kept_dense,
        notes=work.notes,
        linears_dense_bytes=dense,
        linears_packed_bytes=packed,
        source_bytes=read,
        dense_bytes=written - packed + dense,
        packed_bytes=written,
        seconds=time.perf_counter() - started,
    )


def _check(source: Source, storage: Storage, values: ValueType | None) -> None:
    """Refuse what cannot be written, before anything slow."""
    if storage == "sparse-initializer" and values == "int4":
        raise UsageError(
            "ONNX has no sparse initializer of int4", "use --onnx-weights bitmask, or --values int8"
        )
    if storage == "sparse-initializer" and not source.patterns:
        raise ModelError(
            f"{source.checkpoint.path} has no pruned linear to store as sparse initializers",
            "prune it first, or use --onnx-weights dense",
        )
    kind = source.checkpoint.config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{source.checkpoint.path}: {kind} models are not written as ONNX "
            f"({', '.join(FAMILIES)} are)",
            "use --format packed or dense, which serve and transformers read",
        )


def _integers_of(source: Source) -> PackedModel | None:
    """The packed model of a source, if its values are integers."""
    if isinstance(source, PackedSource) and source.packed.config.values in LIMITS:
        return source.packed
    return None


@dataclass
class _Work:
    """One model on its way into a graph."""

    source: Source
    storage: Storage
    values: ValueType | None
    reports: dict[str, LayerReport] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.notes += self.source.notes
        self.packed = _integers_of(self.source) if self.values in LIMITS else None
        self._weight = lru_cache(maxsize=1)(self._read)
        self._mask = lru_cache(maxsize=1)(self._read_mask)
        self._integers = lru_cache(maxsize=1)(self._read_integers)

    @property
    def group(self) -> int | None:
        """Columns that share a scale, of integers."""
        return self.packed.config.group_size if self.packed else None

    def write(self, folder: Path) -> int:
        """Write graph, weights and companions; returns the bytes of the first two."""
        import onnx
        import onnx_ir as ir
        from onnx_ir.passes import common as passes

        from secateur.compile.onnx.functions import functions
        from secateur.compile.onnx.graph import fill
        from secateur.compile.onnx.trace import trace

        checkpoint = self.source.checkpoint
        module = StreamedModel(checkpoint, torch.device("cpu"), None).module
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        graph = trace(module)
        stored = {f"model.{name}": name if name in checkpoint else _EMBEDDINGS for name in names}
        fill(graph, stored, self.stored)
        for function in functions(graph):
            graph.functions[function.identifier()] = function
        passes.ClearMetadataAndDocStringPass()(graph)  # stack traces of the trace
        if self.storage == "sparse-initializer":
            self._save_sparse(ir.to_proto(graph), folder)
        else:
            ir.save(graph, folder / GRAPH, external_data=DATA)
        # ONNX's inference of types knows sparse initializers only as sparse inputs of ops.
        full = self.storage != "sparse-initializer"
        onnx.checker.check_model(str(folder / GRAPH), full_check=full)
        write_json(folder / CONFIG, with_dtype(checkpoint.config, "fp32"))
        for companion in checkpoint.companions():
            shutil.copyfile(companion, folder / companion.name)
        return sum((folder / name).stat().st_size for name in (GRAPH, DATA))

    def _save_sparse(self, proto: Any, folder: Path) -> None:
        """Save with sparse initializers, and note what they cost."""
        import onnx

        from secateur.compile.onnx.sparse import break_even, make_sparse

        names = [f"{name}.weight" for name in self.source.patterns]
        dense = sum(self.sizes[name] for name in self.source.patterns)
        sparse = make_sparse(proto, names)
        onnx.save_model(proto, folder / GRAPH, save_as_external_data=True, location=DATA)
        kind = self._kind(names[0])
        limit = break_even({"fp32": 4, "int8": 1}.get(kind, 2))
        if sparse > dense:
            self.notes.append(
                f"sparse initializers take {sparse / 1e6:.0f} MB, {sparse / dense:.2f} times the "
                f"dense weights: in {kind} they are smaller above {100 * limit:.0f} % zeros only; "
                "--onnx-weights bitmask is smaller at any pattern"
            )

    def stored(self, tensor: str, shape: tuple[int, ...]) -> Stored:
        """How a tensor is stored; counts it."""
        from secateur.compile.onnx import weights

        name, kind = tensor.removesuffix(".weight"), self._kind(tensor)
        load, mask = partial(self._weight, tensor), partial(self._mask, tensor)
        if kind in LIMITS:
            found = self._stored_integers(name, tensor, kind)
        elif name in self.source.patterns and self.storage == "bitmask":
            found = weights.bitmask(tensor, load, mask, int(mask().sum()), shape, kind)
        else:
            found = weights.plain(tensor, load, shape, kind)
        self._count(name, tensor, found, kind)
        return found

    def _stored_integers(self, name: str, tensor: str, kind: ValueType) -> Stored:
        from secateur.compile.onnx import weights

        assert self.packed is not None
        assert self.group is not None
        shape, width = self.packed.layers[name].shape, 8 if kind == "int8" else 4
        load, mask = partial(self._integers, name), partial(self._mask, tensor)
        if self.storage != "bitmask":
            return weights.dense_integers(tensor, load, shape, self.group, width)
        kept = int(mask().sum())
        return weights.bitmask_integers(tensor, load, mask, kept, shape, self.group, width)

    def _kind(self, tensor: str) -> ValueType:
        """The type that a tensor is stored in."""
        name = tensor.removesuffix(".weight")
        if self.packed is not None and name in self.packed.layers:
            return self.packed.config.values
        if self.values is not None and self.values not in LIMITS:
            return self.values
        return VALUE_TYPES[dtype_of(self.source.checkpoint.config)]

    def _read(self, tensor: str) -> torch.Tensor:
        return convert(tensor, self.source.checkpoint.load(tensor), self._kind(tensor))

    def _read_mask(self, tensor: str) -> torch.Tensor:
        return self.source.mask(tensor.removesuffix(".weight"), self.source.checkpoint.load(tensor))

    def _read_integers(self, name: str) -> Quantised:
        assert self.packed is not None
        return self.packed.integers(name)

    def _count(self, name: str, tensor: str, found: Stored, kind: ValueType) -> None:
        size = sum(part.nbytes for part in found.tensors.values())
        scales = found.scales.nbytes if found.scales is not None else 0
        self.sizes[name] = size + scales
        if name not in self.source.layers or found.expand is None:
            return
        shape = self.source.layers[name].shape
        bits = {"fp32": 32, "int8": 8, "int4": 4}.get(kind, 16)
        dense = shape[0] * shape[1] * bits // 8 + scales
        self.reports[name] = LayerReport(
            shape=shape,
            pattern=str(self.source.patterns.get(name, "dense")),
            kept=int(self._mask(tensor).sum()),
            dense_bytes=dense,
            packed_bytes=size + scales,
            ratio=(size + scales) / dense,
        )

    def facts(self, name: str) -> LayerFacts:
        """What the manifest says of a linear."""
        report = self.reports.get(name)
        dense = report.dense_bytes if report else self.sizes[name]
        return self.source.layers[name].model_copy(
            update={"bytes": self.sizes[name], "dense_bytes": dense}
        )
