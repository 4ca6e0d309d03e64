"""The format ``packed``: a Hugging Face directory that stores kept weights only.

A linear P of shape ``[rows, columns]`` is up to three tensors instead of ``P.weight``:

    P.weight_bitmask   uint8 [rows / R, ceil(columns / 8)]    R = block height of its pattern
    P.weight_values    [rows, per_row], or [kept] if the rows keep unequal numbers;
                       int4: uint8 [ceil(kept / 2)]
    P.weight_scales    fp16 [rows, ceil(columns / G)], of int8 and int4;
                       fp32 [rows, 1], of fp8

and everything else is as usual. ``config.json`` says under ``quantization_config`` what each P
holds (`secateur.compile.config`), so that shapes are known before a tensor is read.
docs/format.md is the specification.
"""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.bits import pack_mask
from secateur.checkpoint import CONFIG, Checkpoint
from secateur.compile import stored
from secateur.compile.bitmask import expand, pack_nibbles, pack_values
from secateur.compile.config import (
    BITMASK,
    LIMITS,
    QUANT_METHOD,
    SCALES,
    VALUES,
    PackedConfig,
    PackedLayer,
)
from secateur.compile.quantize import Quantised, scaled
from secateur.compile.stored import Pieces, check_headers
from secateur.compile.values import VALUE_TYPES
from secateur.errors import ModelError
from secateur.orphans import without_compression
from secateur.pattern import Pattern
from secateur.recipe import ValueType


def encode(
    weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern
) -> tuple[PackedLayer, torch.Tensor, torch.Tensor]:
    """Pack one linear, of any type.

    Args:
        weight: ``[rows, columns]``.
        mask: bool ``[rows, columns]``, True = kept; has the pattern.
        pattern: decides how many rows share a row of bits.

    Returns:
        Its entry in ``quantization_config``, its bitmask and its values.
    """
    rows, columns = weight.shape
    values = pack_values(weight, mask)
    per_row = values.shape[1] if values.ndim == 2 else None
    layer = PackedLayer(
        pattern=pattern, shape=(rows, columns), kept=values.numel(), per_row=per_row
    )
    return layer, pack_mask(mask, pattern.rows), values


def encode_integers(
    weight: Quantised, mask: torch.Tensor, pattern: Pattern, values: ValueType
) -> tuple[PackedLayer, dict[str, torch.Tensor]]:
    """Pack one quantised linear.

    Args:
        weight: its values and scales, on the CPU.
        mask, pattern: as of `encode`.
        values: int8, int4 or fp8.

    Returns:
        Its entry in ``quantization_config``, and its tensors by the end of their names.
    """
    layer, bitmask, integers = encode(weight.values, mask, pattern)
    if values == "int4":
        integers = pack_nibbles(integers.flatten())
    elif values == "fp8":
        integers = integers.view(torch.uint8)
    tensors = {BITMASK: bitmask, VALUES: integers, SCALES: weight.scales}
    if pattern.is_dense:
        del tensors[BITMASK]
    return layer, tensors


def decode_mask(name: str, layer: PackedLayer, bitmask: torch.Tensor | None) -> torch.Tensor:
    """The keep-mask of the linear ``name``, checked against its entry.

    Args:
        bitmask: as stored; None if the pattern is dense.

    Returns:
        bool ``[rows, columns]``, on the CPU.

    Raises:
        ModelError: names the tensor, if type, shape, padding, counts or pattern are not as said.
    """
    bits = None if bitmask is None else bitmask.cpu().numpy()
    return torch.from_numpy(stored.mask_of(name, layer, bits))


def decode(
    name: str,
    layer: PackedLayer,
    bitmask: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The dense weight ``[rows, columns]`` of the linear ``name``; removed positions are +0.0.

    Args:
        bitmask, values, scales: as stored; scales of integer and fp8 values only.
        group_size: columns that share a scale, of integers; of fp8 None.
        dtype: type of the result. None: that of the values; of integers and fp8 fp32, to which
            value times scale is rounded (of integers, and with the scales that `secateur compile`
            chooses, exactly). Another type is rounded to from there, to nearest even.

    Raises:
        ModelError: names the tensor that is not as its entry says.
    """
    if scales is None:
        stored.check_shape(name + VALUES, values.shape, layer.values_shape)
        mask = decode_mask(name, layer, bitmask).to(values.device)
        return expand(values, mask).to(dtype or values.dtype)
    found = values.cpu().numpy()
    if group_size is None:
        stored.check_fp8(name, layer, found, scales.cpu().numpy())
        kept = values.view(torch.float8_e4m3fn)
    else:
        integers = stored.integers_of(name, layer, found)
        stored.check_scales(name, layer, scales.cpu().numpy(), group_size)
        kept = torch.from_numpy(integers).to(values.device)
    whole = expand(kept, decode_mask(name, layer, bitmask).to(values.device))
    return scaled(whole, scales, group_size or layer.shape[1]).to(dtype or torch.float32)


def pieces(
    name: str,
    layer: PackedLayer,
    bitmask: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    group_size: int | None = None,
) -> Pieces:
    """The linear ``name`` for a kernel's layout to be made from.

    Args:
        bitmask, values, scales, group_size: as of `decode`, all on the CPU.

    Raises:
        ModelError: as of `decode`.
    """
    kind: ValueType
    if scales is not None:
        kind = "int8" if values.dtype == torch.int8 else "int4"
        kind = kind if group_size else "fp8"
    else:
        kind = VALUE_TYPES[values.dtype]
        values = values if kind == "fp32" else values.view(torch.uint16)
    return stored.pieces(
        name,
        layer,
        None if bitmask is None else bitmask.numpy(),
        values.numpy(),
        None if scales is None else scales.numpy(),
        kind,
        group_size,
    )


class PackedModel:
    """A packed model directory, read one tensor at a time as if it were dense.

    Attributes:
        checkpoint: the directory as it is stored.
        config: its ``quantization_config``.
        layers: the packed linears by module name.

    Raises:
        ModelError: on opening, if the directory is not a packed model or `check_headers` fails;
            on loading, if a bitmask contradicts its values or its pattern, or a value or scale
            is out of range.
    """

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = Checkpoint(path)
        content = self.checkpoint.config.get("quantization_config")
        if not isinstance(content, dict) or content.get("quant_method") != QUANT_METHOD:
            raise ModelError(
                f"{path} is not a packed model: its config.json has no quantization_config of "
                "secateur",
                "pack a pruned model with `secateur compile`",
            )
        self.config = PackedConfig.parse(content, str(self.checkpoint.path / CONFIG))
        self.layers = self.config.layers
        check_headers(self.checkpoint.files, self.config)

    def names(self) -> list[str]:
        """The names of all tensors of the dense model, sorted."""
        packed = {tensor for name in self.layers for tensor in self.config.stored(name)}
        stored = (tensor for tensor in self.checkpoint.names() if tensor not in packed)
        return sorted([*stored, *(name + ".weight" for name in self.layers)])

    def mask(self, name: str) -> torch.Tensor:
        """The keep-mask, bool ``[rows, columns]``, of the packed linear ``name``."""
        return decode_mask(name, self.layers[name], self._stored(name, BITMASK))

    def load(self, tensor: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor of the dense model; ``P.weight`` of a packed linear P is expanded.

        Args:
            dtype: type of an expanded weight; None as in `decode`.
        """
        name = tensor.removesuffix(".weight")
        if tensor.endswith(".weight") and name in self.layers:
            bitmask, scales = self._stored(name, BITMASK), self._stored(name, SCALES)
            values = self.checkpoint.load(name + VALUES)
            size = self.config.group_size
            return decode(name, self.layers[name], bitmask, values, scales, size, dtype)
        return self.checkpoint.load(tensor)

    def integers(self, name: str) -> Quantised:
        """The values and scales of the packed linear ``name``, of int8, int4 and fp8."""
        found = self.pieces(name)
        assert found.scales is not None
        if found.value_type == "fp8":
            kept = torch.from_numpy(found.values).view(torch.float8_e4m3fn)
        else:
            kept = torch.from_numpy(stored.integers_of(name, found.layer, found.values))
        size = self.config.group_size or found.layer.shape[1]
        return Quantised(expand(kept, self.mask(name)), torch.from_numpy(found.scales), size)

    def pieces(self, name: str) -> Pieces:
        """The packed linear ``name`` as it is stored, with every check of `load`."""
        bitmask, scales = self._stored(name, BITMASK), self._stored(name, SCALES)
        values = self.checkpoint.load(name + VALUES)
        size = self.config.group_size
        return pieces(name, self.layers[name], bitmask, values, scales, size)

    def _stored(self, name: str, end: str) -> torch.Tensor | None:
        """A tensor of a packed linear, where it has one."""
        called_for = name + end in self.config.stored(name)
        return self.checkpoint.load(name + end) if called_for else None


class PackedCheckpoint(Checkpoint):
    """A packed model whose names and tensors are those of its dense model.

    Attributes:
        packed: the same directory as it is stored.
        config: without ``quantization_config``.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.packed = PackedModel(path)
        self.config = without_compression(self.config)

    def names(self) -> list[str]:
        """The names of all tensors of the dense model, sorted."""
        return self.packed.names()

    def __contains__(self, name: str) -> bool:
        return name in self.packed.names()

    def _stored(self, name: str) -> list[str]:
        layer = name.removesuffix(".weight")
        expanded = name.endswith(".weight") and layer in self.packed.layers
        return list(self.packed.config.stored(layer)) if expanded else [name]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, or its values."""
        return super().file_of(self._stored(name)[0])

    def nbytes(self, name: str) -> int:
        """The bytes that a tensor takes as it is stored."""
        stored = self.packed.checkpoint
        return sum(stored.nbytes(part) for part in self._stored(name))

    def decoded(self, name: str) -> bool:
        """Whether a tensor is stored with scales, and loaded as fp32."""
        return self.packed.config.values in LIMITS and self._stored(name) != [name]

    def load(self, name: str) -> torch.Tensor:
        """A tensor of the dense model."""
        return self.packed.load(name)


def read_packed(path: str | Path) -> PackedModel:
    """Open a packed model directory; see `PackedModel`."""
    return PackedModel(path)
