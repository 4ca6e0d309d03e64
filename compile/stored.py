"""The tensors of a packed linear as they are stored, and every check of them; no torch.

`secateur.compile.packed` decodes them with torch, the native engine packs them for its kernels:
both see them through the checks here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from secateur.bits import unpack_bits
from secateur.compile import e4m3
from secateur.compile.config import (
    BITMASK,
    LIMITS,
    MAKE_AGAIN,
    SCALES,
    VALUES,
    PackedConfig,
    PackedLayer,
)
from secateur.errors import ModelError
from secateur.recipe import ValueType

Array = np.ndarray[Any, Any]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """A packed linear as it is stored, validated: what a kernel's own layout is made from.

    Attributes:
        layer: its pattern and shape.
        bitmask: uint8 ``[rows / R, ceil(columns / 8)]``; None if the pattern is dense.
        values: ``[rows, per_row]`` or ``[kept]``: float32, uint16 (the bits of bf16 or fp16) or
            int8 of -127 to 127; of int4 uint8 ``[ceil(kept / 2)]``, two values of -7 to 7 a byte;
            of fp8 uint8, the bits of e4m3fn.
        scales: float16 ``[rows, ceil(columns / group_size)]`` of integers; float32 ``[rows, 1]`` of
            fp8; else None.
        value_type: which type the values are.
        group_size: columns that share a scale, of integers; else None.
    """

    layer: PackedLayer
    bitmask: Array | None
    values: Array
    scales: Array | None
    value_type: ValueType
    group_size: int | None


def pieces(
    name: str,
    layer: PackedLayer,
    bitmask: Array | None,
    values: Array,
    scales: Array | None,
    value_type: ValueType,
    group_size: int | None,
) -> Pieces:
    """The linear ``name`` for a kernel's layout to be made from.

    Args:
        bitmask, values, scales, value_type, group_size: as `Pieces` has them.

    Raises:
        ModelError: names the tensor that is not as its entry says.
    """
    mask_of(name, layer, bitmask)
    if scales is not None and group_size is not None:
        integers_of(name, layer, values)
        check_scales(name, layer, scales, group_size)
    elif scales is not None:
        check_fp8(name, layer, values, scales)
    else:
        check_shape(name + VALUES, values.shape, layer.values_shape)
    return Pieces(layer, bitmask, values, scales, value_type, group_size)


def mask_of(name: str, layer: PackedLayer, bitmask: Array | None) -> Bools:
    """The keep-mask of the linear ``name``, bool ``[rows, columns]``, checked against its entry.

    Args:
        bitmask: as stored; None if the pattern is dense.

    Raises:
        ModelError: names the tensor, if type, shape, padding, counts or pattern are not as said.
    """
    if bitmask is None:
        return np.ones(layer.shape, np.bool_)
    tensor = name + BITMASK
    check_shape(tensor, bitmask.shape, layer.bitmask_shape)
    try:
        mask = unpack_bits(bitmask, layer.shape[1], layer.pattern.rows)
    except ValueError as fault:
        raise inconsistent(tensor, str(fault)) from fault
    height = layer.pattern.rows
    counts = np.bitwise_count(bitmask).sum(axis=1, dtype=np.int64)
    if (kept := int(counts.sum()) * height) != layer.kept:
        raise inconsistent(tensor, f"{kept} bits are set for {layer.kept} values")
    if layer.per_row is not None and (wrong := counts != layer.per_row).any():
        row = int(wrong.argmax())
        found = f"row {row * height} keeps {int(counts[row])}, not {layer.per_row}"
        raise inconsistent(tensor, found)
    try:
        layer.pattern.check(mask)
    except ValueError as fault:
        raise inconsistent(tensor, str(fault)) from fault
    return mask


def integers_of(name: str, layer: PackedLayer, values: Array) -> Array:
    """The kept values in order, int8 ``[kept]``, checked to lie within their limits."""
    tensor = name + VALUES
    if values.dtype == np.int8:
        check_shape(tensor, values.shape, layer.values_shape)
        integers, limit = values.reshape(-1), LIMITS["int8"]
    else:
        check_shape(tensor, values.shape, (-(-layer.kept // 2),))
        integers, limit = unpack_nibbles(values, layer.kept), LIMITS["int4"]
        if layer.kept % 2 and int(values[-1]) >> 4:
            raise inconsistent(tensor, f"the unused half of its last byte is {int(values[-1]):#x}")
    if (low := integers < -limit).any():
        place = int(low.argmax())
        raise inconsistent(tensor, f"value {place} is {int(integers[place])}, below {-limit}")
    return integers


def unpack_nibbles(nibbles: Array, count: int) -> Array:
    """The values, int8 ``[count]``, that `secateur.compile.bitmask.pack_nibbles` packed."""
    halves = np.stack([nibbles & 15, nibbles >> 4], axis=1).reshape(-1)[:count]
    values: Array = (halves ^ 8).view(np.int8) - np.int8(8)
    return values


def check_scales(name: str, layer: PackedLayer, scales: Array, group_size: int) -> None:
    """Refuse scales of integers of another shape or type, and negative or infinite ones."""
    tensor = name + SCALES
    check_shape(tensor, scales.shape, (layer.shape[0], -(-layer.shape[1] // group_size)))
    if scales.dtype != np.float16:
        raise inconsistent(tensor, f"type {scales.dtype}, not float16")
    _check_signs(tensor, scales)


def check_fp8(name: str, layer: PackedLayer, values: Array, scales: Array) -> None:
    """Refuse fp8 values that are NaN, and scales that are not, or whose products are not, finite.

    Args:
        values: uint8, the bits of e4m3fn.
        scales: one for each row.

    Raises:
        ModelError: names the tensor, and the first value or scale that is wrong.
    """
    check_shape(name + VALUES, values.shape, layer.values_shape)
    if (wrong := e4m3.is_nan(values.reshape(-1))).any():
        raise inconsistent(name + VALUES, f"value {int(wrong.argmax())} is NaN")
    tensor = name + SCALES
    check_shape(tensor, scales.shape, (layer.shape[0], 1))
    if scales.dtype != np.float32:
        raise inconsistent(tensor, f"type {scales.dtype}, not float32")
    _check_signs(tensor, scales)
    if float(scales.max(initial=0)) > e4m3.LARGEST_SCALE:
        raise inconsistent(tensor, f"the scale of row {int(scales.argmax())} is above 2^119")


def _check_signs(tensor: str, scales: Array) -> None:
    """Refuse negative, infinite and NaN scales."""
    if (wrong := ~np.isfinite(scales) | np.signbit(scales)).any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        found = float(scales[row, group])
        raise inconsistent(
            tensor, f"the scale of row {row}, group {group} is {found:g}: negative or not finite"
        )


def check_shape(tensor: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than its entry says."""
    if tuple(found) != shape:
        raise inconsistent(tensor, f"shape {tuple(found)}, not {shape}")


def inconsistent(tensor: str, why: str) -> ModelError:
    """The error that names a damaged tensor."""
    return ModelError(f"tensor {tensor!r} is damaged: {why}", MAKE_AGAIN)


def check_headers(files: Iterable[Path], config: PackedConfig) -> None:
    """Check by the headers of its safetensors files that a model stores what its config says.

    Raises:
        ModelError: names the first packed tensor that is absent, of another type or shape, or
            there and not called for.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with open_safely(file, "numpy") as handle:
            for tensor in handle.keys():  # noqa: SIM118 (not a mapping)
                entry = handle.get_slice(tensor)
                stored[tensor] = entry.get_dtype(), tuple(entry.get_shape())
    for name in config.layers:
        expected = config.stored(name)
        for tensor, (dtype, shape) in expected.items():
            if tensor not in stored:
                raise ModelError(f"the packed model has no tensor {tensor!r}", MAKE_AGAIN)
            if stored[tensor][0] != dtype:
                raise inconsistent(tensor, f"type {stored[tensor][0]}, not {dtype}")
            if stored[tensor][1] != shape:
                raise inconsistent(tensor, f"shape {stored[tensor][1]}, not {shape}")
        for end in (".weight", BITMASK, SCALES):
            if name + end in stored and name + end not in expected:
                raise ModelError(
                    f"the packed model has a tensor {name + end!r}, which {config.values} values "
                    "of its pattern do not call for",
                    MAKE_AGAIN,
                )


def open_safely(file: Path, framework: Literal["pt", "numpy"] = "pt") -> Any:
    """Open a safetensors file with safetensors' own checks.

    Raises:
        ModelError: the file is absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework)
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{file} cannot be read: {fault}", "copy the file again") from fault
