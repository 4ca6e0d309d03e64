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
from secateur.orphans import is_sparse_form
from secateur.serve.vllm import version
from secateur.serve.vllm.linear import Census, PackedLinearMethod
from secateur.serve.vllm.stores import Orphan, Packed
from secateur.source import resolve_model

logger = init_logger("vllm.secateur")  # vLLM shows the loggers below its own name only


class SecateurConfig(QuantizationConfig):  # type: ignore[misc]
    """``quantization_config`` of a packed model, or of an orphaned checkpoint, as vLLM holds it.

    Attributes:
        store: its linears; of an orphan None until vLLM says where its files are.
    """

    def __init__(self, store: Packed | Orphan | None) -> None:
        super().__init__()
        self.store = store
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
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **_: Any
    ) -> str | None:
        """Take orphaned checkpoints of other methods, whose sparse forms vLLM reads no more."""
        asked = user_quant in (None, QUANT_METHOD)
        return QUANT_METHOD if asked and is_sparse_form(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SecateurConfig:
        """Read ``quantization_config``.

        Raises:
            EnvironmentFault: this vLLM is not one that secateur supports.
            ModelError: the config is not that of a packed model; names the first wrong key.
        """
        version()
        if is_sparse_form(config):
            return cls(None)
        return cls(Packed(PackedConfig.parse(config, "config.json")))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Check the headers of the files; called before any weight is read.

        Raises:
            ModelError: names the first tensor that is absent or not as the config says.
        """
        if self.store is None:
            self.store = Orphan(resolve_model(model_name))
            return
        files = sorted(Path(model_name).glob("*.safetensors"))
        if files and isinstance(self.store, Packed):  # else on a hub: checked when it is loaded
            check_headers(files, self.store.config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the layers by the names that vLLM's model gives its modules."""
        if self.store is not None:
            self.store = self.store.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What computes the module ``prefix``; None: what vLLM would take without us.

        Raises:
            ModelError: it is packed, and no linear.
        """
        assert self.store is not None
        layers = self.store.names
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            if any(part in layers for part in parts):
                return PackedLinearMethod(self.store, prefix, parts, self.census)
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
        if self.store is not None and prefix in self.store.names:
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
