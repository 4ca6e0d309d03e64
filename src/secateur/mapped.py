"""A checkpoint whose tensors are read where they lie in their files, with numpy and no torch."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError

Array = np.ndarray[Any, Any]

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_DTYPES |= {"I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "<b1"}


class MappedCheckpoint(Checkpoint):
    """A model directory whose files are mapped into memory; see `Checkpoint`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._maps: dict[Path, mmap.mmap] = {}

    def array(self, name: str) -> Array:
        """A tensor as it lies in its file, read-only; of bf16 the bits, uint16.

        Raises:
            ModelError: it is absent, or of a type that numpy does not have.
        """
        shard, entry = self._entry(name)
        if entry["dtype"] not in _DTYPES:
            raise ModelError(
                f"tensor {name!r} is of type {entry['dtype']}",
                f"convert the model to one of {', '.join(_DTYPES)}",
            )
        shape, dtype = tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]])
        if self.nbytes(name) == 0:
            return np.empty(shape, dtype)
        start = self._starts[shard] + entry["data_offsets"][0]
        count = self.nbytes(name) // dtype.itemsize
        return np.frombuffer(self._map(shard), dtype, count, start).reshape(shape)

    def release(self, name: str) -> None:
        """Let go of the memory of a tensor's file pages; reading it again reads the file."""
        shard, entry = self._entry(name)
        start, end = (self._starts[shard] + offset for offset in entry["data_offsets"])
        start += -start % mmap.PAGESIZE  # pages that it has for itself
        end -= end % mmap.PAGESIZE
        if start < end:
            self._map(shard).madvise(mmap.MADV_DONTNEED, start, end - start)

    def _map(self, shard: Path) -> mmap.mmap:
        if shard not in self._maps:
            with shard.open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]
