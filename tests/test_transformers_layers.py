"""Decoder layers that take their sizes from their own block's config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.modeling_layers import GradientCheckpointingLayer

from secateur import transformers_layers


class Config:
    def __init__(self, heads: int, blocks: tuple[Config, ...] = ()) -> None:
        self.heads, self.per_layer_config = heads, blocks
        self.is_heterogeneous = bool(blocks)


@pytest.mark.parametrize("hook", ["of this version", "none, as in 5.17"])
def test_a_layer_is_made_with_its_own_config(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if hook != "of this version":
        monkeypatch.delattr(GradientCheckpointingLayer, "__init_subclass__")
        transformers_layers._install()

    class Layer(GradientCheckpointingLayer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__()
            self.heads, self.config = config.heads, config

    whole = Config(9, (Config(4), Config(2)))
    assert [Layer(whole, layer_idx=i).heads for i in range(2)] == [4, 2]
    assert Layer(whole, 1).config is whole
    assert Layer(Config(5), 1).heads == 5
