"""``quantization_config`` of a packed model: what each linear holds, and as which tensors.

docs/format.md is the specification. Version 1 has floating-point values, version 2 integers with
group scales, version 3 fp8 values with a scale for each row.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.recipe import ValueType

QUANT_METHOD = "secateur"
BITMASK, VALUES, SCALES = ".weight_bitmask", ".weight_values", ".weight_scales"
GROUP_SIZES = (32, 64, 128)
LIMITS: dict[ValueType, int] = {"int8": 127, "int4": 7, "fp8": 448}
"""The largest magnitude of a value with a scale. Integers are symmetric: no -128 and no -8."""
VERSIONS: dict[ValueType, int] = {"fp32": 1, "bf16": 1, "fp16": 1, "int8": 2, "int4": 2, "fp8": 3}
"""The format version that values take."""
MAKE_AGAIN = "write the directory again with `secateur compile`, or copy it again"
_STORED_TYPES: dict[ValueType, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_STORED_TYPES |= {"int8": "I8", "int4": "U8", "fp8": "U8"}

_Extent = Annotated[int, Field(gt=0)]


class PackedLayer(BaseModel):
    """What ``quantization_config`` says of one packed linear.

    Attributes:
        pattern: the pattern that its mask has; ``dense``: it has no mask, all weights are kept.
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
        if self.pattern.is_dense and self.per_row != columns:
            raise ValueError(f"dense keeps {columns} of each row, not {self.per_row}")
        return self

    @property
    def bitmask_shape(self) -> tuple[int, int]:
        """Shape of ``P.weight_bitmask``, if the pattern is not dense."""
        return self.shape[0] // self.pattern.rows, (self.shape[1] + 7) // 8

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of ``P.weight_values``, other than of int4."""
        return (self.kept,) if self.per_row is None else (self.shape[0], self.per_row)


class PackedConfig(BaseModel):
    """``quantization_config`` of a packed model.

    Attributes:
        format_version: 1 with floating-point values, 2 with integers, 3 with fp8.
        values: type of every packed linear's values.
        group_size: columns that share a scale, of integers; else None.
        layers: the packed linears by module name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["secateur"] = "secateur"
    format_version: Literal[1, 2, 3] = 1
    values: ValueType
    group_size: int | None = Field(None, validate_default=True)
    layers: dict[str, PackedLayer]

    @field_validator("values")
    @classmethod
    def _of_this_version(cls, values: ValueType, info: ValidationInfo) -> ValueType:
        version = info.data.get("format_version", 1)
        if VERSIONS[values] != version:
            known = ", ".join(name for name, its in VERSIONS.items() if its == version)
            known = " or ".join(known.rsplit(", ", 1))
            raise ValueError(f"format version {version} has {known}, not {values}")
        return values

    @field_validator("group_size", mode="before")
    @classmethod
    def _size(cls, size: Any, info: ValidationInfo) -> Any:
        integers = info.data.get("values") in ("int8", "int4")
        if integers and (size not in GROUP_SIZES or type(size) is not int):
            raise ValueError(f"groups have 32, 64 or 128 columns, not {size!r}")
        if not integers and size is not None:
            raise ValueError("floating-point values have no groups")
        return size

    @field_validator("layers")
    @classmethod
    def _packed(
        cls, layers: dict[str, PackedLayer], info: ValidationInfo
    ) -> dict[str, PackedLayer]:
        if info.data.get("format_version") == 1:
            for name, layer in layers.items():
                if layer.pattern.is_dense:
                    raise ValueError(f"{name} is dense, which format version 1 does not list")
        return layers

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        if self.group_size is None:
            del written["group_size"]
        return written

    @classmethod
    def of(
        cls, values: ValueType, group_size: int | None, layers: dict[str, PackedLayer]
    ) -> PackedConfig:
        """The config of the version that these values take."""
        version = VERSIONS[values]
        return cls(
            format_version=version,
            values=values,
            group_size=group_size if version == 2 else None,
            layers=layers,
        )

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
                f"{origin}: quantization_config: {place}: {first['msg']}", MAKE_AGAIN
            ) from fault

    def stored(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of the packed linear ``name``: safetensors type and shape by full name."""
        layer = self.layers[name]
        shape = layer.values_shape if self.values != "int4" else (-(-layer.kept // 2),)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            name + VALUES: (_STORED_TYPES[self.values], shape)
        }
        if not layer.pattern.is_dense:
            tensors[name + BITMASK] = ("U8", layer.bitmask_shape)
        if self.group_size is not None:
            groups = -(-layer.shape[1] // self.group_size)
            tensors[name + SCALES] = ("F16", (layer.shape[0], groups))
        elif self.values == "fp8":
            tensors[name + SCALES] = ("F32", (layer.shape[0], 1))
        return tensors
