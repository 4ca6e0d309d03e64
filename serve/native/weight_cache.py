"""Packed weights in files that processes map: nothing is packed again, and all hold one copy.

    8 bytes    length of the header, little-endian
    header     JSON: what the weights were packed from; of each matrix what it is, and where its
               streams lie; spaces up to a multiple of 64 bytes
    streams    each at a multiple of 64, with 64 bytes of room behind it
    8 bytes    checksum of all before

What such a file says is trusted as if this process had packed it. So it lies in the user's own
cache, and counts only if it belongs to the user and nobody else can write to it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import secateur
from secateur.checkpoint import sync_file
from secateur.compile import cpu
from secateur.errors import EnvironmentFault
from secateur.source import cache_directory

_LAYOUTS = 1  # counts changes of compile/csrc/layout.h
_LINE = 64


class WeightCache:
    """The file of one model with one choice of value types, in ``$SECATEUR_CACHE/weights``.

    Args:
        model: the model directory.
        settings: what else decides how its weights are packed.

    Attributes:
        path: the file.

    Raises:
        EnvironmentFault: the cache cannot be made, is not the user's, or others can write to it.
    """

    def __init__(self, model: Path, settings: Mapping[str, Any]) -> None:
        home = cache_directory() / "weights"
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as fault:
            raise EnvironmentFault(
                f"the cache {home} cannot be made: {fault.strerror}",
                "set SECATEUR_CACHE to a directory that you can write to",
            ) from fault
        if not _only_ours(home.stat()):
            raise EnvironmentFault(
                f"the cache {home} belongs to another user, or others can write to it",
                f"set SECATEUR_CACHE to a directory of your own, or run chmod go-w {home}",
            )
        files = (one for one in model.iterdir() if one.suffix in (".safetensors", ".json"))
        self._identity = {
            "secateur": secateur.__version__,
            "layouts": _LAYOUTS,
            "files": {file.name: _facts(file.stat()) for file in files},
        }
        name = json.dumps([str(model.resolve()), dict(settings)], sort_keys=True)
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.path = home / f"{model.resolve().name}-{digest}"

    def read(self) -> dict[str, cpu.CpuMatrix]:
        """The matrices by name, on shared memory; none if the file is absent, damaged or old."""
        try:
            with self.path.open("rb") as file:
                if not _only_ours(os.fstat(file.fileno())):
                    return {}
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # absent, or empty
            return {}
        whole = np.frombuffer(mapped, np.uint8)
        body = whole[:-8]
        if len(body) < _LINE or len(body) % _LINE:
            return {}
        if cpu.checksum(body) != int.from_bytes(whole[-8:].tobytes(), "little"):
            return {}
        length = int.from_bytes(body[:8].tobytes(), "little")
        header = json.loads(body[8 : 8 + length].tobytes())
        if header["of"] != self._identity:
            return {}
        streams = body[8 + length :]
        return {name: _opened(facts, streams) for name, facts in header["matrices"].items()}

    def write(self, matrices: Mapping[str, cpu.CpuMatrix]) -> None:
        """Keep these; whoever reads meanwhile sees the old file or the new one.

        Raises:
            EnvironmentFault: there is no room, or no permission.
        """
        entries, streams, at = {}, [], 0
        for name, matrix in sorted(matrices.items()):
            places = {}
            for part, stream in matrix.streams.items():
                places[part] = [at, stream.nbytes]
                streams.append(stream)
                at += _room(stream.nbytes)
            entries[name] = {**matrix.facts, "streams": places}
        encoded = json.dumps({"of": self._identity, "matrices": entries}).encode()
        encoded += b" " * (-(8 + len(encoded)) % _LINE)
        aside = None
        try:
            with tempfile.NamedTemporaryFile("w+b", dir=self.path.parent, delete=False) as file:
                aside = Path(file.name)
                file.write(len(encoded).to_bytes(8, "little") + encoded)
                for stream in streams:
                    file.write(stream.data)
                    file.write(bytes(_room(stream.nbytes) - stream.nbytes))
                file.flush()
                body = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
                file.write(cpu.checksum(body).to_bytes(8, "little"))
            sync_file(aside)
            os.replace(aside, self.path)
        except OSError as fault:
            if aside is not None:
                aside.unlink(missing_ok=True)
            raise EnvironmentFault(
                f"packed weights cannot be written to {self.path.parent}: {fault.strerror}",
                "make room there, or set SECATEUR_CACHE to another directory",
            ) from fault


def _room(size: int) -> int:
    return -(-(size + _LINE) // _LINE) * _LINE


def _opened(entry: dict[str, Any], body: np.ndarray[Any, Any]) -> cpu.CpuMatrix:
    streams = {}
    for part, (start, size) in entry.pop("streams").items():
        # What the kernels read in steps they may read a step too far; starts are counted.
        starts = part.endswith("starts")
        stream = body[start : start + (size if starts else _room(size))]
        streams[part] = stream.view(np.int64) if starts else stream
    return cpu.mapped(entry, streams)


def _only_ours(facts: os.stat_result) -> bool:
    return facts.st_uid == os.geteuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _facts(facts: os.stat_result) -> list[int]:
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
