"""The format ``packed``, version 1: a Hugging Face directory that stores kept weights only.

A pruned linear P of shape ``[rows, columns]`` is two tensors instead of ``P.weight``:

    P.weight_bitmask   uint8 [rows / R, ceil(columns / 8)]    R = block height of its pattern
    P.weight_values    [rows, per_row], or [kept] if the rows keep unequal numbers

and everything else is as usual. ``config.json`` says under ``quantization_config`` what each P
holds, so that shapes are known before a tensor is read. docs/format.md is the specification.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from secateur.bits import pack_mask, unpack_mask
from secateur.checkpoint import CONFIG, Checkpoint
from secateur.compile.bitmask import count_kept, expand, pack_values
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.recipe import ValueType

QUANT_METHOD = "secateur"
BITMASK, VALUES = ".weight_bitmask", ".weight_values"
_STORED_TYPES: dict[ValueType, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_MAKE_AGAIN = "write the directory again with `secateur compile`, or copy it again"

_Extent = Annotated[int, Field(gt=0)]


class PackedLayer(BaseModel):
    """What ``quantization_config`` says of one packed linear.

    Attributes:
        pattern: the pattern that its mask has.
        shape: rows (outputs) and columns (inputs) of the dense weight.
        kept: how many weights are kept.
        per_row: how many each row keeps; None if the rows differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: Pattern
    shape: tuple[_Extent, _Extent]
    kept: int = Field(ge=0)
    per_row: int | None

    @field_validator("pattern", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Pattern:
        try:
            return value if isinstance(value, Pattern) else Pattern.parse(value)
        except UsageError as fault:
            raise ValueError(fault.what) from fault

    @model_validator(mode="after")
    def _agree(self) -> PackedLayer:
        rows, columns = self.shape
        if (why := self.pattern.obstacle(rows, columns)) is not None:
            raise ValueError(f"{self.pattern} does not fit: {why}")
        if self.kept > rows * columns:
            raise ValueError(f"{self.kept} kept of {rows * columns} weights")
        if self.per_row is not None and self.per_row * rows != self.kept:
            raise ValueError(f"{rows} rows of {self.per_row} are not {self.kept} kept weights")
        return self

    @property
    def bitmask_shape(self) -> tuple[int, int]:
        """Shape of ``P.weight_bitmask``."""
        return self.shape[0] // self.pattern.rows, (self.shape[1] + 7) // 8

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of ``P.weight_values``."""
        return (self.kept,) if self.per_row is None else (self.shape[0], self.per_row)


class PackedConfig(BaseModel):
    """``quantization_config`` of a packed model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["secateur"] = "secateur"
    format_version: Literal[1] = 1
    values: ValueType
    layers: dict[str, PackedLayer]

    @classmethod
    def parse(cls, content: Any, origin: str) -> PackedConfig:
        """Validate the JSON form.

        Raises:
            ModelError: names the first key that is wrong.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as fault:
            first = fault.errors()[0]
            place = " of ".join(str(part) for part in reversed(first["loc"]))
            raise ModelError(
                f"{origin}: quantization_config: {place}: {first['msg']}", _MAKE_AGAIN
            ) from fault


def encode(
    weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern
) -> tuple[PackedLayer, torch.Tensor, torch.Tensor]:
    """Pack one linear.

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


def decode_mask(name: str, layer: PackedLayer, bitmask: torch.Tensor) -> torch.Tensor:
    """The keep-mask of the linear ``name``, checked against its entry.

    Returns:
        bool ``[rows, columns]``, on the CPU.

    Raises:
        ModelError: names the tensor, if type, shape, padding, counts or pattern are not as said.
    """
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
    name: str, layer: PackedLayer, bitmask: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The dense weight ``[rows, columns]`` of the linear ``name``; removed positions are +0.0.

    Raises:
        ModelError: names the tensor that is not as its entry says.
    """
    if tuple(values.shape) != layer.values_shape:
        raise _inconsistent(name + VALUES, f"shape {tuple(values.shape)}, not {layer.values_shape}")
    return expand(values, decode_mask(name, layer, bitmask).to(values.device))


def _inconsistent(tensor: str, why: str) -> ModelError:
    return ModelError(f"tensor {tensor!r} is damaged: {why}", _MAKE_AGAIN)


def check_headers(files: Iterable[Path], config: PackedConfig) -> None:
    """Check by the headers of its safetensors files that a model stores what its config says.

    Raises:
        ModelError: names the first packed tensor that is absent or of another type or shape.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with open_safely(file) as handle:
            for tensor in handle.keys():  # noqa: SIM118 (not a mapping)
                entry = handle.get_slice(tensor)
                stored[tensor] = entry.get_dtype(), tuple(entry.get_shape())
    for name, layer in config.layers.items():
        expected = {
            name + BITMASK: ("U8", layer.bitmask_shape),
            name + VALUES: (_STORED_TYPES[config.values], layer.values_shape),
        }
        for tensor, (dtype, shape) in expected.items():
            if tensor not in stored:
                raise ModelError(f"the packed model has no tensor {tensor!r}", _MAKE_AGAIN)
            if stored[tensor][0] != dtype:
                raise _inconsistent(tensor, f"type {stored[tensor][0]}, not {dtype}")
            if stored[tensor][1] != shape:
                raise _inconsistent(tensor, f"shape {stored[tensor][1]}, not {shape}")


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
            on loading, if a bitmask contradicts its values or its pattern.
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
        stored = (
            tensor
            for tensor in self.checkpoint.names()
            if not (tensor.endswith((BITMASK, VALUES)) and _module_of(tensor) in self.layers)
        )
        return sorted([*stored, *(name + ".weight" for name in self.layers)])

    def mask(self, name: str) -> torch.Tensor:
        """The keep-mask, bool ``[rows, columns]``, of the packed linear ``name``."""
        return decode_mask(name, self.layers[name], self.checkpoint.load(name + BITMASK))

    def load(self, tensor: str) -> torch.Tensor:
        """Read one tensor of the dense model; ``P.weight`` of a packed linear P is expanded."""
        name = _module_of(tensor)
        if tensor.endswith(".weight") and name in self.layers:
            bitmask = self.checkpoint.load(name + BITMASK)
            return decode(name, self.layers[name], bitmask, self.checkpoint.load(name + VALUES))
        return self.checkpoint.load(tensor)


def read_packed(path: str | Path) -> PackedModel:
    """Open a packed model directory; see `PackedModel`."""
    return PackedModel(path)


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]
