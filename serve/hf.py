"""Packed models in transformers: importing this module registers the quantizer "secateur".

``AutoModelForCausalLM.from_pretrained(DIR)`` then opens a packed directory: each packed linear is
a `SparseLinear`, and ``generate``, ``save_pretrained`` (which writes the packed form again) and
``dequantize`` work as usual. To load as plain dense linears at once::

    config = AutoConfig.from_pretrained(DIR)
    config.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(DIR, config=config)

transformers has no entry points; ``import secateur`` arranges for this import, see
`secateur._transformers_hook`. It happens while ``transformers.quantizers`` is half imported, hence
the imports from its submodules here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.compile.config import BITMASK, QUANT_METHOD, SCALES, VALUES, PackedConfig, PackedLayer
from secateur.compile.packed import check_headers, decode
from secateur.compile.values import LIMITS, VALUE_TYPES
from secateur.errors import ModelError
from secateur.recipe import ValueType


class SparseLinear(torch.nn.Module):
    """A linear layer stored as bitmask and kept values.

    For now it computes with a dense copy of its weight, made once after loading (plain
    ``F.linear``): as quick as the dense layer, and it needs the memory of both forms. Kernels
    that run on the packed form come later.

    Attributes:
        weight_bitmask: uint8 ``[rows / R, ceil(columns / 8)]``; None if no weight was removed.
        weight_values: ``[rows, per_row]`` or ``[kept]``; of int4 uint8 ``[ceil(kept / 2)]``.
        weight_scales: fp16 ``[rows, ceil(columns / group_size)]`` of integer values, else None.
            Casting the model leaves it as it is.
        value_type, group_size: of integer values, else None.
        dtype: of the dense weight, if the values are integers.
        bias: ``[rows]`` or None.
        weight: dense ``[rows, columns]``, not saved; None until `expand` was called.
    """

    weight_bitmask: torch.Tensor | None
    weight_scales: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        name: str,
        layer: PackedLayer,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        value_type: ValueType | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self.value_type, self.group_size = value_type, group_size
        self.dtype = dtype or torch.get_default_dtype()
        self.out_features, self.in_features = layer.shape
        # Which tensors there are, and their shapes: as in a file of this layer alone.
        config = PackedConfig.of(value_type or "fp32", group_size, {name: layer})
        shapes = {tensor: shape for tensor, (_, shape) in config.stored(name).items()}
        kind = {"int8": torch.int8, "int4": torch.uint8}.get(value_type or "", dtype)
        values = torch.empty(shapes[name + VALUES], dtype=kind, device=device)
        self.weight_values = torch.nn.Parameter(values, requires_grad=False)
        for end, kind in ((BITMASK, torch.uint8), (SCALES, torch.float16)):
            shape = shapes.get(name + end)
            held = None if shape is None else torch.empty(shape, dtype=kind, device=device)
            self.register_buffer(end.removeprefix("."), held)
        self.register_parameter("bias", None)
        if bias:
            added = torch.empty(self.out_features, dtype=dtype, device=device)
            self.bias = torch.nn.Parameter(added, requires_grad=False)
        self.register_buffer("weight", None, persistent=False)

    def expand(self) -> None:
        """Check the loaded tensors and make the dense weight.

        Raises:
            ModelError: names the tensor that contradicts the model's config.
        """
        values, scales = self.weight_values.detach(), self.weight_scales
        dtype = None if scales is None else self.dtype
        self.weight = decode(
            self.name, self.layer, self.weight_bitmask, values, scales, self.group_size, dtype
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        """Move or cast; the scales are moved only."""
        scales = self.weight_scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight is not None:
            self.dtype = self.weight.dtype
        applied = self.weight_scales
        if scales is not None and applied is not None and applied.dtype != scales.dtype:
            self.weight_scales = scales.to(applied.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        assert self.weight is not None, f"{self.name} was not expanded after loading"
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def to_dense(self) -> torch.nn.Linear:
        """The same layer as a plain `torch.nn.Linear`; shares the dense weight's memory."""
        assert self.weight is not None, f"{self.name} was not expanded after loading"
        linear = torch.nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = torch.nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = torch.nn.Parameter(self.bias)
        return linear

    def extra_repr(self) -> str:
        """Shape and pattern, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, pattern={self.layer.pattern}"
        )


class SecateurConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` as transformers holds it; validated on construction.

    Args:
        content: the keys of `secateur.compile.packed.PackedConfig`.
        dequantize: load as plain dense linears; never written to a file.
    """

    def __init__(self, dequantize: bool = False, **content: Any) -> None:
        self.packed = PackedConfig.parse(content, "config.json")
        self.quant_method = QUANT_METHOD
        self.dequantize = dequantize

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return self.packed.model_dump(mode="json")


class SecateurQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds, loads and saves packed models inside ``from_pretrained`` and ``save_pretrained``."""

    quantization_config: SecateurConfig

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> Any:
        packed = self.quantization_config.packed
        if checkpoint_files:  # absent if the caller passed a state_dict
            check_headers([Path(file) for file in checkpoint_files], packed)
        modules = dict(model.named_modules())
        for name, layer in packed.layers.items():
            path = _module_path(name, model.base_model_prefix, modules)
            linear = modules[path]
            if not isinstance(linear, torch.nn.Linear) or tuple(linear.weight.shape) != layer.shape:
                raise ModelError(
                    f"config.json calls {name!r} a packed linear of shape {layer.shape}, but the "
                    f"model has {linear} there",
                    "write the directory again with `secateur compile`",
                )
            bias = linear.bias is not None
            values = packed.values if packed.values in LIMITS else None
            sparse = SparseLinear(
                path, layer, bias, dtype, linear.weight.device, values, packed.group_size
            )
            model.set_submodule(path, sparse)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.weight_values.requires_grad_(False)
                module.expand()
        if self.quantization_config.dequantize:
            self._dequantize(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                model.set_submodule(name, module.to_dense())
        if isinstance(dtype, str):  # config.dtype after a save_pretrained
            dtype = getattr(torch, dtype)
        if dtype is not None and dtype != model.dtype:
            for parameter in model.parameters():  # not .to(dtype), which would cast buffers too
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by ``save_pretrained`` first: make the config tell what will be written.

        The model may be in another type than its file was (``dtype=``, ``.to``), and the bare
        decoder of a causal LM (``AutoModel``) has other module names.
        """
        sparse = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SparseLinear)
        }
        types = {
            module.value_type or VALUE_TYPES.get(module.weight_values.dtype)
            for module in sparse.values()
        }
        values = types.pop() if len(types) == 1 else None
        if values is None:
            raise ModelError(
                "the packed linears are not all fp32, all bf16 or all fp16",
                "convert the model to one of these types before saving it",
            )
        layers = {name: module.layer for name, module in sparse.items()}
        size = self.quantization_config.packed.group_size
        self.quantization_config.packed = PackedConfig.of(values, size, layers)
        return None, {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed form."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights do not train; dequantize first."""
        return False


def _module_path(name: str, prefix: str, modules: dict[str, torch.nn.Module]) -> str:
    """Where a layer of the file lies in the model, with or without the base model's prefix."""
    for path in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if path in modules:
            return path
    raise ModelError(
        f"config.json calls {name!r} a packed linear, but the model has no such module",
        "open the directory with the architecture that it was made from",
    )


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(SecateurConfig)
    register_quantizer(QUANT_METHOD)(SecateurQuantizer)
