"""A `SparseLinear` from a packed linear, as a file of it would be loaded."""

from __future__ import annotations

from typing import Any

import torch

from secateur.compile.config import BITMASK, SCALES, VALUES, PackedLayer
from secateur.compile.stored import Pieces
from secateur.serve.linear import SparseLinear
from tests.compile.gpu.linears import HALVES


def tensors(pieces: Pieces) -> dict[str, torch.Tensor]:
    """The stored tensors of a linear, as a file has them."""
    values = torch.from_numpy(pieces.values)
    if pieces.value_type in HALVES:
        values = values.view(HALVES[pieces.value_type])
    found = {VALUES: values}
    if pieces.bitmask is not None:
        found[BITMASK] = torch.from_numpy(pieces.bitmask)
    if pieces.scales is not None:
        found[SCALES] = torch.from_numpy(pieces.scales)
    return found


def make(pieces: Pieces, dtype: torch.dtype, *, bias: bool = True) -> SparseLinear:
    layer: PackedLayer = pieces.layer
    integers = pieces.value_type in ("int8", "int4", "fp8")
    kind: Any = pieces.value_type if integers else None
    module = SparseLinear(
        "layer", layer, bias, dtype, value_type=kind, group_size=pieces.group_size
    )
    for end, tensor in tensors(pieces).items():
        name = end.removeprefix(".")
        if name == "weight_values":
            module.weight_values.data = tensor
        else:
            setattr(module, name, tensor)
    if module.bias is not None:
        module.bias.data.normal_()
    module.prepare()
    return module
