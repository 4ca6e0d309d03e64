"""Which heads and channels of a model remain, and tensors cut down to them.

A *KV group* is a KV head with the query heads that read it: queries of group j are the heads
j·rep … (j+1)·rep - 1. Groups and MLP channels are removed whole, from every linear they touch:

    q_proj rows, k_proj rows, v_proj rows, o_proj columns          of the group's heads
    gate_proj rows, up_proj rows, down_proj columns                of the channel

Norms of queries and keys are shared by all heads and stay as they are, and so do the embeddings
and the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import ModelError
from secateur.layer_sizes import LayerSizes

if TYPE_CHECKING:
    from secateur.architecture import Parts
    from secateur.model import StreamedModel


@dataclass(frozen=True, slots=True)
class Kept:
    """What remains of a block.

    Attributes:
        groups: KV groups, ascending numbers in the original block.
        channels: channels of the MLP, likewise.
    """

    groups: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What remains of a model.

    Attributes:
        blocks: of each original block; None if it is gone.
        rep: query heads of a group.
        head_dim, hidden: sizes of a head and of the residual stream.
        gates: linears before the MLP's product, 2 with a gate.
    """

    blocks: tuple[Kept | None, ...]
    rep: int
    head_dim: int
    hidden: int
    gates: int

    @classmethod
    def of(cls, model: StreamedModel) -> Shape:
        """All of a model.

        Raises:
            ModelError: its architecture has no parts that structured methods know.
        """
        parts = model.architecture.parts
        if parts is None:
            kind = model.checkpoint.config["model_type"]
            raise ModelError(
                f"structured methods know no heads and channels of {kind!r}",
                "use a method that zeroes weights, see `secateur methods`",
            )
        blocks: list[Kept | None] = []
        rep = head_dim = 0
        for index in range(len(model.blocks)):
            own = {
                name.removeprefix(model.block_prefix(index)): linear.shape
                for name, linear in model.linears(index).items()
            }
            attention: Any = model.blocks[index].get_submodule(parts.keys.rpartition(".")[0])
            head_dim = int(attention.head_dim)
            groups = own[parts.keys][0] // head_dim
            if rep not in (0, here := own[parts.queries][0] // own[parts.keys][0]):
                raise ModelError(
                    f"block {index} has {here} query heads to a KV head, others {rep}",
                    "prune the model that it was made from",
                )
            rep = here
            blocks.append(Kept(torch.arange(groups), torch.arange(own[parts.down][1])))
        hidden = int(model.module.config.hidden_size)
        return cls(tuple(blocks), rep, head_dim, hidden, len(parts.gates))

    @property
    def alive(self) -> list[int]:
        """The blocks that remain."""
        return [index for index, kept in enumerate(self.blocks) if kept is not None]

    @property
    def group_weights(self) -> int:
        """Weights of a KV group."""
        return 2 * (self.rep + 1) * self.head_dim * self.hidden

    @property
    def channel_weights(self) -> int:
        """Weights of a channel."""
        return (self.gates + 1) * self.hidden

    @property
    def weights(self) -> int:
        """Weights of all linears in blocks."""
        groups = sum(len(kept.groups) for kept in self.blocks if kept)
        channels = sum(len(kept.channels) for kept in self.blocks if kept)
        return groups * self.group_weights + channels * self.channel_weights

    def sizes(self) -> list[LayerSizes]:
        """Of the blocks that remain."""
        return [
            LayerSizes(len(kept.groups) * self.rep, len(kept.groups), len(kept.channels))
            for kept in self.blocks
            if kept is not None
        ]

    def with_block(self, index: int, kept: Kept | None) -> Shape:
        """The same with another block, or without it."""
        blocks = (*self.blocks[:index], kept, *self.blocks[index + 1 :])
        return replace(self, blocks=blocks)

    def cut(self, parts: Parts, name: str, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
        """What remains of a tensor of an original block; ``name`` within the block."""
        linear, _, kind = name.rpartition(".")
        keys = _rows(kept.groups, self.head_dim)
        queries = _rows(kept.groups, self.head_dim * self.rep)
        rows = {parts.queries: queries, parts.keys: keys, parts.values: keys}
        rows |= dict.fromkeys(parts.gates, kept.channels)
        columns = {parts.output: queries, parts.down: kept.channels}
        if linear in rows:
            return tensor[rows[linear]]
        if linear in columns and kind == "weight":
            return tensor[:, columns[linear]]
        return tensor


def _rows(groups: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of groups of ``width`` consecutive rows."""
    return (groups[:, None] * width + torch.arange(width)).flatten()


def common_sizes(model: StreamedModel) -> LayerSizes:
    """What the top of a model's ``config.json`` says of its blocks."""
    config = model.module.config.to_dict()
    heads = int(config["num_attention_heads"])
    kv_heads = config.get("num_key_value_heads")
    return LayerSizes(heads, int(kv_heads or heads), int(config["intermediate_size"]))
