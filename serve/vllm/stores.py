"""The two kinds of model files that the plug-in opens, as a linear of vLLM asks for its parts.

A `Packed` store takes the tensors that vLLM reads. An `Orphan` store reads the files by itself,
linear by linear, as each form of `secateur.compile.orphan` needs all tensors of one at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from secateur.compile.config import (
    BITMASK,
    LIMITS,
    MAKE_AGAIN,
    SCALES,
    VALUES,
    PackedConfig,
    PackedLayer,
)
from secateur.compile.orphan import GROUP, OrphanCheckpoint
from secateur.compile.packed import encode, encode_integers, pieces
from secateur.compile.quantize import Quantised
from secateur.compile.stored import Pieces
from secateur.compile.values import DTYPES
from secateur.compile.zeros import mask_of, pattern_of
from secateur.errors import ModelError
from secateur.orphans import rescue
from secateur.pattern import Pattern
from secateur.recipe import ValueType

WEIGHT = ".weight"
_TYPES = {**DTYPES, "int8": torch.int8, "int4": torch.uint8, "fp8": torch.uint8}


class Store(Protocol):
    """The linears of a model that are not stored as dense weights, by their names in vLLM.

    Attributes:
        reads_files: whether `read` needs no tensors.
    """

    reads_files: bool

    @property
    def names(self) -> list[str]:
        """Their names."""

    def shape(self, part: str) -> tuple[int, int] | None:
        """Rows and columns of one; None: known when it is read."""

    def tensors(self, part: str) -> dict[str, torch.dtype | None]:
        """Its tensors by the ends of their names, with their types; None: that of the model."""

    def read(self, part: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Pieces:
        """A linear as it is stored, with every check.

        Args:
            part: one of `names`.
            tensors: what vLLM read, by whole names.
            dtype: the type of the model, which products with scales become.

        Raises:
            ModelError: names the tensor that is absent or damaged.
        """


class Packed:
    """The linears of a packed model."""

    reads_files = False

    def __init__(self, config: PackedConfig) -> None:
        self.config = config

    @property
    def names(self) -> list[str]:
        """As of `Store`."""
        return list(self.config.layers)

    def rename(self, mapper: Any) -> Packed:
        """The same under the names that vLLM's model gives its modules."""
        layers = mapper.apply_dict(self.config.layers)
        return Packed(self.config.model_copy(update={"layers": layers}))

    def shape(self, part: str) -> tuple[int, int]:
        """As of `Store`."""
        return self.config.layers[part].shape

    def tensors(self, part: str) -> dict[str, torch.dtype | None]:
        """As of `Store`."""
        values = self.config.values
        scales = torch.float32 if values == "fp8" else torch.float16
        types = {BITMASK: torch.uint8, SCALES: scales, VALUES: _TYPES[values]}
        ends = (tensor.removeprefix(part) for tensor in self.config.stored(part))
        return {end: types[end] for end in ends}

    def read(self, part: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Pieces:
        """As of `Store`."""
        for end in self.tensors(part):
            if part + end not in tensors:
                raise ModelError(f"the packed model has no tensor {part + end!r}", MAKE_AGAIN)
        bitmask, values, scales = (tensors.get(part + end) for end in (BITMASK, VALUES, SCALES))
        assert values is not None
        layer, size = self.config.layers[part], self.config.group_size
        return pieces(part, layer, bitmask, values, scales, size)


class Orphan:
    """The linears of an orphaned checkpoint.

    Args:
        path: its directory.

    Raises:
        ModelError: as `OrphanCheckpoint`, or it compresses what is no linear.
    """

    reads_files = True

    def __init__(self, path: Path) -> None:
        self.checkpoint = OrphanCheckpoint(path)
        self._files: dict[str, str] = {}  # name in vLLM: name in the files
        for tensor in self.checkpoint.names():
            parts = self.checkpoint.stored_as(tensor)
            if parts == [tensor]:
                continue
            linear = tensor.removesuffix(WEIGHT)
            if linear == tensor or parts[0].startswith(f"{tensor}."):  # of any parameter
                raise ModelError(
                    f"{path} stores {tensor!r} as {parts[0]!r}, a form for which vLLM has no place",
                    f"make a packed model of it: `{rescue(path)}`",
                )
            self._files[linear] = linear

    @property
    def names(self) -> list[str]:
        """As of `Store`."""
        return list(self._files)

    def rename(self, mapper: Any) -> Orphan:
        """The same under the names that vLLM's model gives its modules."""
        self._files = mapper.apply_dict(self._files)
        return self

    def shape(self, part: str) -> None:
        """As of `Store`."""
        return None

    def tensors(self, part: str) -> dict[str, torch.dtype | None]:
        """As of `Store`; with what it has beside them for its activations."""
        name = self._files[part]
        stored = self.checkpoint.stored_as(name + WEIGHT)
        beside = (found for found in self.checkpoint.dropped if found.startswith(name + "."))
        return {tensor.removeprefix(name): torch.uint8 for tensor in [*stored, *beside]}

    def read(self, part: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Pieces:
        """As of `Store`."""
        tensor = self._files[part] + WEIGHT
        scaled = self.checkpoint.decoded(tensor)
        if scaled:
            found = self.checkpoint.integers(tensor)
            if not isinstance(found, str):
                return _integers(part, found)
        weight = self.checkpoint.load(tensor)
        weight = weight.to(dtype) if scaled else weight
        pattern = pattern_of(weight)
        layer, bitmask, values = encode(weight, mask_of(weight, pattern), pattern)
        return pieces(part, layer, None if pattern.is_dense else bitmask, values)


def _integers(part: str, found: Quantised) -> Pieces:
    """Integers with their scales, in the narrowest type that holds them; or fp8."""
    pattern = pattern_of(found.values)
    mask = mask_of(found.values, pattern)
    kind: ValueType = "int8"
    if found.values.is_floating_point():
        kind = "fp8"
    elif int(found.values.abs().max()) <= LIMITS["int4"]:
        kind = "int4"
    layer, parts = encode_integers(found, mask, pattern, kind)
    size = None if kind == "fp8" else GROUP
    return pieces(part, layer, parts.get(BITMASK), parts[VALUES], parts[SCALES], size)


def dense_pieces(part: str, weight: torch.Tensor) -> Pieces:
    """A linear that is stored dense, beside others that are not.

    Args:
        weight: ``[rows, columns]``.
    """
    rows, columns = weight.shape
    count = weight.numel()
    layer = PackedLayer(pattern=Pattern(), shape=(rows, columns), kept=count, per_row=columns)
    return pieces(part, layer, None, weight.contiguous())
