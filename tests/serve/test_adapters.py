"""LoRA on packed linears computes and learns what it does on the dense twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from secateur.errors import UsageError
from secateur.serve.adapters import on_packed
from tests.serve.hf_models import TOKENS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT
TARGETS = ["q_proj", "up_proj", "down_proj"]


def adapted(directory: Path) -> PeftModel:
    """A model with an adapter whose two factors are random, not zero."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LoraConfig(target_modules=TARGETS, r=3, lora_alpha=5, task_type="CAUSAL_LM")
    model = get_peft_model(model, on_packed(config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model


def test_forward_and_backward(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    pruned, packed = made["qwen2"]
    gradients, losses = [], []
    for directory in (pruned, packed):
        model = adapted(directory)
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.detach())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients.append([parameter.grad for parameter in trained.values()])
        assert len(trained) == 2 * 2 * len(TARGETS)
        assert all("lora_" in name for name in trained)
    assert torch.allclose(*losses, rtol=1e-5)
    for dense, sparse in zip(*gradients, strict=True):
        assert dense.norm() > 0
        assert (sparse - dense).norm() < 1e-3 * dense.norm()

    with pytest.raises(UsageError, match="cannot be merged"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = on_packed(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(base, tmp_path, config=config)
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
