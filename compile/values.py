"""The types that weights are stored in, and how a model is converted to one."""

from __future__ import annotations

from typing import Any

import torch

from secateur.compile.config import LIMITS
from secateur.errors import ModelError, UsageError, did_you_mean
from secateur.recipe import ValueType

DTYPES: dict[ValueType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
VALUE_TYPES = {dtype: name for name, dtype in DTYPES.items()}


def check_value_type(values: str | None) -> None:
    """Raise UsageError unless ``values`` is None or a known type."""
    if values is not None and values not in (*DTYPES, *LIMITS):
        known = [*DTYPES, *LIMITS]
        raise UsageError(f"value type {values!r} is not known", did_you_mean(values, known))


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The type that a ``config.json`` names for the weights; fp32 if it names none."""
    named = config.get("dtype", config.get("torch_dtype"))
    return {str(dtype).removeprefix("torch."): dtype for dtype in VALUE_TYPES}.get(
        str(named), torch.float32
    )


def with_dtype(config: dict[str, Any], values: ValueType | None) -> dict[str, Any]:
    """A ``config.json`` that names the type of the weights; None and integers leave it."""
    if values is None or values in LIMITS:
        return dict(config)
    named = {key: value for key, value in config.items() if key != "torch_dtype"}  # transformers 4
    return named | {"dtype": str(DTYPES[values]).removeprefix("torch.")}


def convert(name: str, weight: torch.Tensor, values: ValueType | None) -> torch.Tensor:
    """A tensor in the wanted type, rounded to nearest even; integers stay as they are.

    Where integer values are wanted, the tensor stays as it is, too: quantising takes more than a
    conversion, see `secateur.compile.quantize`.

    Raises:
        ModelError: it holds NaN, or a value too large for the type; names the tensor.
    """
    if not weight.is_floating_point():
        return weight
    if bool(torch.isnan(weight).any()):
        raise ModelError(f"tensor {name!r} holds NaN", "the model is damaged: get it again")
    if values is None or values in LIMITS or weight.dtype == DTYPES[values]:
        return weight
    converted = weight.to(DTYPES[values])
    if bool((torch.isinf(converted) & ~torch.isinf(weight)).any()):
        largest = float(weight[torch.isfinite(weight)].abs().max())
        raise ModelError(
            f"tensor {name!r} holds {largest:g}, which is too large for {values}",
            "use --values bf16, which has the range of fp32",
        )
    return converted
