"""The format ``packed``: a Hugging Face directory that stores kept weights only.

A linear P of shape ``[rows, columns]`` is up to three tensors instead of ``P.weight``:

    P.weight_bitmask   uint8 [rows / R, ceil(columns / 8)]    R = block height of its pattern
    P.weight_values    [rows, per_row], or [kept] if the rows keep unequal numbers;
                       int4: uint8 [ceil(kept / 2)]
    P.weight_scales    fp16 [rows, ceil(columns / G)], of int8 and int4 only

and everything else is as usual. ``config.json`` says under ``quantization_config`` what each P
holds (`secateur.compile.config`), so that shapes are known before a tensor is read.
docs/format.md is the specification.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.bits import pack_mask, unpack_mask
from secateur.checkpoint import CONFIG, Checkpoint
from secateur.compile.bitmask import (
    count_kept,
    expand,
    pack_nibbles,
    pack_values,
    unpack_nibbles,
)
from secateur.compile.config import (
    BITMASK,
    MAKE_AGAIN,
    QUANT_METHOD,
    SCALES,
    VALUES,
    PackedConfig,
    PackedLayer,
)
from secateur.compile.quantize import Quantised, scaled
from secateur.compile.values import LIMITS, VALUE_TYPES
from secateur.errors import ModelError
from secateur.pattern import Pattern
from secateur.recipe import ValueType

__all__ = ["BITMASK", "QUANT_METHOD", "SCALES", "VALUES", "PackedConfig", "PackedLayer"]
__all__ += ["PackedModel", "Pieces", "check_headers", "decode", "decode_mask", "encode"]
__all__ += ["encode_integers", "open_safely", "pieces", "read_packed"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """A packed linear as it is stored, validated: what a kernel's own layout is made from.

    Attributes:
        layer: its pattern and shape.
        bitmask: uint8 ``[rows / R, ceil(columns / 8)]``; None if the pattern is dense.
        values: ``[rows, per_row]`` or ``[kept]``: float32, uint16 (the bits of bf16 or fp16) or
            int8 of -127 to 127; of int4 uint8 ``[ceil(kept / 2)]``, two values of -7 to 7 a byte.
        scales: float16 ``[rows, ceil(columns / group_size)]``; None if the values are not integer.
        value_type: which type the values are.
        group_size: columns that share a scale, or None.
    """

    layer: PackedLayer
    bitmask: np.ndarray[Any, Any] | None
    values: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any] | None
    value_type: ValueType
    group_size: int | None


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
        weight: its integers and scales, on the CPU.
        mask, pattern: as of `encode`.
        values: int8 or int4.

    Returns:
        Its entry in ``quantization_config``, and its tensors by the end of their names.
    """
    layer, bitmask, integers = encode(weight.values, mask, pattern)
    if values == "int4":
        integers = pack_nibbles(integers.flatten())
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
    if bitmask is None:
        return torch.ones(layer.shape, dtype=torch.bool)
    tensor = name + BITMASK
    if tuple(bitmask.shape) != layer.bitmask_shape:
        raise _inconsistent(tensor, f"shape {tuple(bitmask.shape)}, not {layer.bitmask_shape}")
    try:
        mask = unpack_mask(bitmask, layer.shape[1], layer.pattern.rows)
    except ValueError as fault:
        raise _inconsistent(tensor, str(fault)) from fault
    counts = count_kept(mask)
    if int(counts.sum()) != layer.kept:
        raise _inconsistent(tensor, f"{int(counts.sum())} bits are set for {layer.kept} values")
    if layer.per_row is not None and (wrong := counts != layer.per_row).any():
        row = int(wrong.argmax())
        raise _inconsistent(tensor, f"row {row} keeps {int(counts[row])}, not {layer.per_row}")
    try:
        layer.pattern.check(mask)
    except ValueError as fault:
        raise _inconsistent(tensor, str(fault)) from fault
    return mask


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
        bitmask, values, scales: as stored; scales of integer values only.
        group_size: columns that share a scale.
        dtype: type of the result. None: that of the values; of integers fp32, which holds value
            times scale exactly. Another type is rounded to once, to nearest even.

    Raises:
        ModelError: names the tensor that is not as its entry says.
    """
    if scales is None or group_size is None:
        _check_shape(name + VALUES, values, layer.values_shape)
        mask = decode_mask(name, layer, bitmask).to(values.device)
        return expand(values, mask).to(dtype or values.dtype)
    integers = _integers(name, layer, values)
    _check_scales(name, layer, scales, group_size)
    whole = expand(integers, decode_mask(name, layer, bitmask).to(values.device))
    return scaled(whole, scales, group_size).to(dtype or torch.float32)


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
    decode_mask(name, layer, bitmask)
    if scales is not None and group_size is not None:
        _integers(name, layer, values)
        _check_scales(name, layer, scales, group_size)
        kind: ValueType = "int8" if values.dtype == torch.int8 else "int4"
    else:
        _check_shape(name + VALUES, values, layer.values_shape)
        kind = VALUE_TYPES[values.dtype]
        values = values if kind == "fp32" else values.view(torch.uint16)
    return Pieces(
        layer,
        None if bitmask is None else bitmask.numpy(),
        values.numpy(),
        None if scales is None else scales.numpy(),
        kind,
        group_size,
    )


def _integers(name: str, layer: PackedLayer, values: torch.Tensor) -> torch.Tensor:
    """The kept values in order, int8 ``[kept]``, checked to lie within their limits."""
    tensor = name + VALUES
    if values.dtype == torch.int8:
        _check_shape(tensor, values, layer.values_shape)
        integers, limit = values.reshape(-1), LIMITS["int8"]
    else:
        _check_shape(tensor, values, (-(-layer.kept // 2),))
        integers, limit = unpack_nibbles(values, layer.kept), LIMITS["int4"]
        if layer.kept % 2 and int(values[-1]) >> 4:
            raise _inconsistent(tensor, f"the unused half of its last byte is {int(values[-1]):#x}")
    if (low := integers < -limit).any():
        place = int(low.nonzero()[0])
        raise _inconsistent(tensor, f"value {place} is {int(integers[place])}, below {-limit}")
    return integers


def _check_scales(name: str, layer: PackedLayer, scales: torch.Tensor, group_size: int) -> None:
    tensor = name + SCALES
    _check_shape(tensor, scales, (layer.shape[0], -(-layer.shape[1] // group_size)))
    if scales.dtype != torch.float16:
        raise _inconsistent(tensor, f"type {scales.dtype}, not float16")
    if (wrong := ~scales.isfinite() | scales.signbit()).any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        found = float(scales[row, group])
        raise _inconsistent(
            tensor, f"the scale of row {row}, group {group} is {found:g}: negative or not finite"
        )


def _check_shape(tensor: str, found: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape:
        raise _inconsistent(tensor, f"shape {tuple(found.shape)}, not {shape}")


def _inconsistent(tensor: str, why: str) -> ModelError:
    return ModelError(f"tensor {tensor!r} is damaged: {why}", MAKE_AGAIN)


def check_headers(files: Iterable[Path], config: PackedConfig) -> None:
    """Check by the headers of its safetensors files that a model stores what its config says.

    Raises:
        ModelError: names the first packed tensor that is absent, of another type or shape, or
            there and not called for.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with open_safely(file) as handle:
            for tensor in handle.keys():  # noqa: SIM118 (not a mapping)
                entry = handle.get_slice(tensor)
                stored[tensor] = entry.get_dtype(), tuple(entry.get_shape())
    for name in config.layers:
        expected = config.stored(name)
        for tensor, (dtype, shape) in expected.items():
            if tensor not in stored:
                raise ModelError(f"the packed model has no tensor {tensor!r}", MAKE_AGAIN)
            if stored[tensor][0] != dtype:
                raise _inconsistent(tensor, f"type {stored[tensor][0]}, not {dtype}")
            if stored[tensor][1] != shape:
                raise _inconsistent(tensor, f"shape {stored[tensor][1]}, not {shape}")
        for end in (".weight", BITMASK, SCALES):
            if name + end in stored and name + end not in expected:
                raise ModelError(
                    f"the packed model has a tensor {name + end!r}, which {config.values} values "
                    "of its pattern do not call for",
                    MAKE_AGAIN,
                )


def open_safely(file: Path) -> Any:
    """Open a safetensors file with safetensors' own checks.

    Raises:
        ModelError: the file is absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{file} cannot be read: {fault}", "copy the file again") from fault


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


def read_packed(path: str | Path) -> PackedModel:
    """Open a packed model directory; see `PackedModel`."""
    return PackedModel(path)
