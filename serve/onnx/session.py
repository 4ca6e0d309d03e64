"""A decoder with KV cache in ONNX Runtime: providers, the cache of folded models, one step.

Weights that are stored as bitmasks are expanded when the runtime folds constants. As that takes
seconds, the folded graph is kept (`cache_directory`) and opened in its place the next time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoint import CONFIG, read_json
from secateur.compile.onnx.environment import require
from secateur.compile.onnx.read import read_graph
from secateur.device import cpu_name
from secateur.errors import EnvironmentFault, ModelError, UsageError, did_you_mean
from secateur.source import cache_directory

GRAPH = "model.onnx"
_SUFFIX = "ExecutionProvider"
_MAX_LENGTH = 2048  # where config.json names none
_INPUTS = {"input_ids", "attention_mask", "position_ids"}

Provider = tuple[str, dict[str, str]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


def parse_providers(wanted: Sequence[str]) -> list[Provider]:
    """Providers of ONNX Runtime from ``name`` or ``name:key=value,key=value``; cpu comes last.

    Raises:
        UsageError: there is no such provider, or an option has no value.
        EnvironmentFault: the installed ONNX Runtime lacks it.
    """
    require("onnxruntime")
    import onnxruntime

    known = {name.removesuffix(_SUFFIX).lower(): name for name in onnxruntime.get_all_providers()}
    present = onnxruntime.get_available_providers()
    found: list[Provider] = []
    for text in wanted:
        name, _, rest = text.partition(":")
        if name.lower() not in known:
            raise UsageError(f"there is no provider {name!r}", did_you_mean(name, known))
        full = known[name.lower()]
        if full not in present:
            raise EnvironmentFault(
                f"this ONNX Runtime has no {full} (it has {', '.join(present)})",
                "install a build that has it, e.g. onnxruntime-gpu for cuda and tensorrt",
            )
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise UsageError(
                f"--provider {text!r}: {bad[0]!r} has no value",
                "write it as cuda:device_id=0,arena_extend_strategy=kSameAsRequested",
            )
        found.append((full, {key: value for key, _, value in pairs}))
    if not any(name == "CPU" + _SUFFIX for name, _ in found):
        found.append(("CPU" + _SUFFIX, {}))
    return found


@dataclass(frozen=True)
class OnnxModel:
    """An open decoder.

    Attributes:
        session: of ONNX Runtime.
        config: the model's config.json.
        layers, heads, width: of the KV cache.
        graph: the file that is run: from the cache of folded models, if that has it.
        runtime: version of ONNX Runtime.
    """

    session: Any
    config: dict[str, Any]
    layers: int
    heads: int
    width: int
    graph: Path
    runtime: str

    @classmethod
    def open(
        cls, directory: Path, threads: int, providers: Sequence[str] = (), keep: bool = True
    ) -> OnnxModel:
        """Open a directory with ``model.onnx`` and ``config.json``.

        Args:
            directory: the model.
            threads: of the CPU.
            providers: see `parse_providers`; none: cpu.
            keep: read and write the cache of folded models.

        Raises:
            ModelError: the file is damaged, or not a decoder with KV cache.
            UsageError, EnvironmentFault: see `parse_providers`.
        """
        chosen = parse_providers(providers)
        config = read_json(directory / CONFIG)
        graph = read_graph(directory / GRAPH)
        expands = any(function.domain == "secateur" for function in graph.functions)
        if keep and expands and len(chosen) == 1:
            session, path = _folded_session(directory, threads)
        else:
            path = directory / GRAPH
            session = _session(path, threads, chosen)
        shapes = {one.name: one.shape for one in session.get_inputs()}
        if missing := sorted((_INPUTS | {"past_key_values.0.key"}) - shapes.keys()):
            raise ModelError(
                f"{directory / GRAPH} is no decoder with KV cache: it has no input {missing[0]!r}",
                "export it with `secateur compile --format onnx`",
            )
        layers = sum(name.endswith(".key") for name in shapes)
        _, heads, _, width = shapes["past_key_values.0.key"]
        return cls(session, config, layers, heads, width, path, _version())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that it computes with."""
        return sum(file.stat().st_size for file in self.graph.parent.glob(f"{GRAPH}*"))

    @property
    def max_length(self) -> int:
        """Tokens that it reads at most."""
        return int(self.config.get("max_position_embeddings", _MAX_LENGTH))

    def step(self, ids: np.ndarray[Any, Any], past: Sequence[Any]) -> tuple[Floats, list[Any]]:
        """Read tokens.

        Args:
            ids: int64 ``[batch, new]``.
            past: the cache from the step before; empty at first.

        Returns:
            Logits ``[batch, new, vocabulary]`` and the cache, values of ONNX Runtime.
        """
        from onnxruntime import OrtValue

        batch, new = ids.shape
        if not past:
            empty = np.zeros((batch, self.heads, 0, self.width), np.float32)
            past = [OrtValue.ortvalue_from_numpy(empty)] * (2 * self.layers)
        seen = past[0].shape()[2]
        positions = np.broadcast_to(np.arange(seen, seen + new), (batch, new))
        tokens = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((batch, seen + new), np.int64),
            "position_ids": np.ascontiguousarray(positions, np.int64),
        }
        feeds = {name: OrtValue.ortvalue_from_numpy(array) for name, array in tokens.items()}
        feeds |= zip(_cache_names("past_key_values", self.layers), past, strict=True)
        outputs = ["logits", *_cache_names("present", self.layers)]
        logits, *present = self.session.run_with_ort_values(outputs, feeds)
        return logits.numpy(), present


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _session(
    path: Path, threads: int, providers: Sequence[Provider], keep_in: Path | None = None
) -> Any:
    """Open a graph; with ``keep_in`` also write it there as it is after optimisation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if keep_in is not None:
        options.optimized_model_filepath = str(keep_in / GRAPH)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", GRAPH + ".data"
        )
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as fault:  # its exceptions have no common class
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {fault}",
            "write it again with `secateur compile --format onnx`, or update onnxruntime",
        ) from fault


def _folded_session(directory: Path, threads: int) -> tuple[Any, Path]:
    """A session on the CPU and its file: the folded graph, which is made if there is none."""
    cpu: list[Provider] = [("CPU" + _SUFFIX, {})]
    home = cache_directory() / "onnx" / _digest(str(directory.resolve()))
    kept = home / _state(directory)
    if (kept / GRAPH).is_file():
        return _session(kept / GRAPH, threads, cpu), kept / GRAPH
    try:
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=home, prefix="making-"))
    except OSError as fault:
        return _unkept(directory, threads, fault)
    try:
        session = _session(directory / GRAPH, threads, cpu, aside)
        for old in home.iterdir():
            if not old.name.startswith("making-"):
                shutil.rmtree(old, ignore_errors=True)
        os.replace(aside, kept)
    except OSError as fault:
        shutil.rmtree(aside, ignore_errors=True)
        return _unkept(directory, threads, fault)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print(f"onnx: weights expanded; kept in {kept} for the next time", file=sys.stderr)
    return session, kept / GRAPH


def _unkept(directory: Path, threads: int, fault: OSError) -> tuple[Any, Path]:
    print(f"onnx: the folded model is not kept: {fault}", file=sys.stderr)
    path = directory / GRAPH
    return _session(path, threads, [("CPU" + _SUFFIX, {})]), path


def _state(directory: Path) -> str:
    """Changes with the files, the runtime and the CPU, for which the kept graph is made."""
    facts = [_version(), cpu_name()]
    for name in (GRAPH, GRAPH + ".data"):
        if (directory / name).exists():
            status = (directory / name).stat()
            facts += [str(status.st_size), str(status.st_mtime_ns)]
    return _digest("\n".join(facts))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
