"""Packed models in transformers: importing this module registers the quantizer "secateur".

``AutoModelForCausalLM.from_pretrained(DIR)`` then opens a packed directory: each packed linear is
a `SparseLinear`, and ``generate``, ``save_pretrained`` (which writes the packed form again) and
``dequantize`` work as usual. It computes on the packed form; `kernel_report` says what computes
with which kernels, and why. To load as plain dense linears at once::

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

from secateur.compile import torch_ops
from secateur.compile.config import LIMITS, QUANT_METHOD, PackedConfig
from secateur.compile.stored import check_headers
from secateur.compile.values import VALUE_TYPES
from secateur.errors import ModelError, UsageError
from secateur.serve.linear import Activations, KernelUse, SparseLinear, kernel_report

__all__ = ["KernelUse", "SecateurConfig", "SecateurQuantizer", "SparseLinear", "kernel_report"]


class SecateurConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` as transformers holds it; validated on construction.

    Args:
        content: the keys of `secateur.compile.packed.PackedConfig`.
        dequantize: load as plain dense linears; never written to a file.
        activations: what int8 and int4 values are multiplied with on a CPU: "int8" (the default,
            see docs/kernels.md) or "fp32"; never written to a file.
    """

    def __init__(
        self, dequantize: bool = False, activations: Activations | None = None, **content: Any
    ) -> None:
        self.packed = PackedConfig.parse(content, "config.json")
        self.quant_method = QUANT_METHOD
        self.dequantize = dequantize
        if activations not in (None, "fp32", "int8"):
            raise UsageError(f"activations {activations!r} are not known", "choose int8 or fp32")
        self.activations = activations

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
                path,
                layer,
                bias,
                dtype,
                linear.weight.device,
                values,
                packed.group_size,
                self.quantization_config.activations,
            )
            model.set_submodule(path, sparse)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.quantization_config.dequantize:
            return self._dequantize(model)
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.weight_values.requires_grad_(False)
                module.prepare()
        if any(use.path == "kernels" for use in kernel_report(model)):
            torch_ops.follow_torch_threads()
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
        """Adapters on top do (`secateur.serve.adapters`); the packed weights never change."""
        return True


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
