"""Tiny pruned and packed models, and what is compared of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from secateur.compile import pack_model
from tests.compile import conftest as by_hand

__all__ = ["by_hand"]

LAYER = "model.layers.1.mlp.down_proj"
TOKENS = torch.tensor([[1, 5, 9, 33, 60, 2], [7, 7, 21, 0, 3, 63]])
MODELS = {
    "llama": {"pattern": "2:4"},
    "odd": {"pattern": "2:4", "hidden": 36, "inner": 44},
    "qwen2": {"pattern": "50%", "kind": "qwen2"},
    "blocks": {"pattern": "50%@16x1", "kind": "qwen2", "tied": True},
    "tied": {"pattern": "4:16", "tied": True, "shard": "40KB", "dense": ("k_proj",)},
}
Pairs = dict[str, tuple[Path, Path]]


def make_models(folder: Path) -> Pairs:
    """Each model of MODELS as (pruned, packed) directories."""
    pairs = {}
    for name, how in MODELS.items():
        pruned = by_hand.prune_by_hand(folder / f"{name}-pruned", **how)
        pack_model(pruned, folder / f"{name}-packed")
        pairs[name] = (pruned, folder / f"{name}-packed")
    return pairs


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def close(model: Any, dense: Any, tolerance: float | None = None) -> bool:
    """Whether two models agree up to the rounding of their type."""
    found, wanted = logits(model), logits(dense)
    assert found.dtype == wanted.dtype
    limit = (
        tolerance or {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[found.dtype]
    )
    return float((found - wanted).float().norm() / wanted.float().norm()) < limit


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in directory.glob("model*.safetensors") for k, v in load_file(file).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )
