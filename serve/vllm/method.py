"""The quantisation method "secateur" of vLLM: which linears of a model are packed, and as what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from secateur.compile.config import QUANT_METHOD, PackedConfig
from secateur.compile.stored import check_headers
from secateur.errors import ModelError
from secateur.serve.vllm import version
from secateur.serve.vllm.linear import Census, PackedLinearMethod

logger = init_logger("vllm.secateur")  # vLLM shows the loggers below its own name only


class SecateurConfig(QuantizationConfig):  # type: ignore[misc]
    """``quantization_config`` of a packed model as vLLM holds it.

    Attributes:
        packed: what the directory stores, by the module names of vLLM.
    """

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.packed = packed
        self.census = Census()

    @classmethod
    def get_name(cls) -> str:
        """The ``quant_method`` of config.json."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of the activations, whatever the values are."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a CUDA device."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SecateurConfig:
        """Read ``quantization_config``.

        Raises:
            EnvironmentFault: this vLLM is not one that secateur supports.
            ModelError: the config is not that of a packed model; names the first wrong key.
        """
        version()
        return cls(PackedConfig.parse(config, "config.json"))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Check the headers of the files; called before any weight is read.

        Raises:
            ModelError: names the first tensor that is absent or not as the config says.
        """
        files = sorted(Path(model_name).glob("*.safetensors"))
        if files:  # else a name on a hub: each tensor is checked when it is loaded
            check_headers(files, self.packed)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the layers by the names that vLLM's model gives its modules."""
        layers = hf_to_vllm_mapper.apply_dict(self.packed.layers)
        self.packed = self.packed.model_copy(update={"layers": layers})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes the module ``prefix``; None: what vLLM would take without us.

        Raises:
            ModelError: it is packed, and no linear.
        """
        layers = self.packed.layers
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            if any(part in layers for part in parts):
                return PackedLinearMethod(self.packed, prefix, parts, self.census)
            self.census.dense.append(prefix)
            return UnquantizedLinearMethod()
        inside = [name for name in layers if name == prefix or name.startswith(f"{prefix}.")]
        if inside:
            raise ModelError(
                f"{inside[0]!r} is packed, and vLLM computes it in a {type(layer).__name__}, for "
                "which secateur has no kernels",
                "leave it dense when pruning, or serve it with --engine transformers",
            )
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The linears of the file that one of vLLM computes, as it merges q, k and v."""
        if prefix in self.packed.layers:
            return [prefix]
        parent, dot, last = prefix.rpartition(".")
        return [parent + dot + name for name in self.packed_modules_mapping.get(last, [last])]


def register() -> None:
    """See `secateur.serve.vllm.register`."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD in QUANTIZATION_METHODS:
        if get_quantization_config(QUANT_METHOD) is SecateurConfig:
            return
        logger.warning("another plug-in has registered %r, too: it is replaced", QUANT_METHOD)
    register_quantization_config(QUANT_METHOD)(SecateurConfig)
