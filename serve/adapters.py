"""PEFT's LoRA layers on the linears of a packed model.

    model = AutoModelForCausalLM.from_pretrained("packed")
    model = get_peft_model(model, on_packed(LoraConfig(target_modules=["q_proj", "v_proj"])))

The adapter trains; the packed weights below it stay as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

from secateur.errors import EnvironmentFault, UsageError
from secateur.serve.linear import SparseLinear


def on_packed(config: Any) -> Any:
    """Let a LoRA configuration name packed linears as its targets.

    Args:
        config: a ``peft.LoraConfig``, which is changed. PEFT does not save what is added: an
            adapter is loaded with ``PeftModel.from_pretrained(model, DIR,
            config=on_packed(LoraConfig.from_pretrained(DIR)))``.

    Returns:
        The same configuration.

    Raises:
        EnvironmentFault: PEFT is not installed.
    """
    try:
        from peft.tuners.lora import Linear
    except ImportError as fault:
        raise EnvironmentFault(f"PEFT cannot be imported: {fault}", "pip install peft") from fault

    class LoraOnPacked(Linear):  # type: ignore[misc]
        """A LoRA layer whose base is never changed."""

        def __init__(self, *args: Any, **options: Any) -> None:
            with warnings.catch_warnings():  # that PEFT has no packed linears of its own
                warnings.filterwarnings("ignore", "Unsupported layer type")
                super().__init__(*args, **options)

        def merge(self, *_: Any, **__: Any) -> None:
            raise UsageError(
                "an adapter cannot be merged into packed weights: its product is dense",
                "merge it into the model that `secateur compile --format dense` writes, or keep it "
                "beside the packed weights",
            )

    config._register_custom_module({SparseLinear: LoraOnPacked})
    return config
