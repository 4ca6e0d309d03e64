"""Which architectures are supported.

Support is data (`ARCHITECTURES`): where the blocks are, and where a checkpoint's names differ from
those of the modules. Which linears there are, and which of them share an input, is seen in the
model itself. To describe a new architecture add an entry; nothing else needs to know its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import ModelError


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels inside a block whose order is free: the linears before and after them.

    Attributes:
        producers: linears whose outputs they are, by name within the block.
        consumer: the linear whose inputs they are.
        heads: whether they belong to attention heads, the value heads of the producers and the
            query heads of the consumer.
    """

    producers: tuple[str, ...]
    consumer: str
    heads: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """The linears of a block that has attention heads and MLP channels, by name within the block.

    A structured method removes KV heads with all query heads that read them, and channels.
    """

    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where things are in a family of models.

    Attributes:
        blocks: module path of the list of blocks.
        stored: replacements that turn a module's name into the checkpoint's, in this order.
        experts: what the checkpoint calls the gate, up and down linear of an expert, where the
            modules hold all experts in two fused tensors.
        routers: last parts of the names of linears that choose or weigh experts. They are small
            and a wrong choice costs a whole expert, so they stay dense.
        reads: what the model takes as input.
        channels: those that can be permuted. Nothing but an activation, a product or attention
            weights may lie between producers and consumer. (Fused experts need no entry.)
        parts: what structured methods can make smaller; None: nothing.
    """

    blocks: str
    stored: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] | None = None
    routers: frozenset[str] = frozenset()
    reads: Literal["text", "images"] = "text"
    channels: tuple[Channels, ...] = ()
    parts: Parts | None = None


_VALUES = Channels(("self_attn.v_proj",), "self_attn.o_proj", heads=True)
_LLAMA_LIKE = Architecture(
    blocks="model.layers",
    channels=(_VALUES, Channels(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")),
    parts=Parts(),
)
_FIRST_GPTS = Architecture(blocks="transformer.h")
_QWEN_MOE = Architecture(
    blocks="model.layers",
    experts=("gate_proj", "up_proj", "down_proj"),
    routers=frozenset({"gate", "shared_expert_gate"}),
    channels=(
        _VALUES,
        Channels(
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            "mlp.shared_expert.down_proj",
        ),
    ),
)


def _vision(root: str) -> Architecture:
    return Architecture(
        blocks=f"{root}.layers",
        stored=(
            (f"{root}.layers.", f"{root}.encoder.layer."),
            (".attention.q_proj.", ".attention.attention.query."),
            (".attention.k_proj.", ".attention.attention.key."),
            (".attention.v_proj.", ".attention.attention.value."),
            (".attention.o_proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ),
        reads="images",
    )


# By `model_type` of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "bloom": _FIRST_GPTS,
    "deit": _vision("deit"),
    "falcon": _FIRST_GPTS,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "gpt2": _FIRST_GPTS,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": Architecture(
        blocks="model.layers",
        stored=((".mlp.", ".block_sparse_moe."),),
        experts=("w1", "w3", "w2"),
        routers=frozenset({"gate"}),
        channels=(_VALUES,),
    ),
    "opt": Architecture(
        blocks="model.decoder.layers",
        channels=(
            Channels(("self_attn.v_proj",), "self_attn.out_proj", heads=True),
            Channels(("fc1",), "fc2"),
        ),
    ),
    "phi3": Architecture(blocks="model.layers"),
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": _QWEN_MOE,
    "qwen3": _LLAMA_LIKE,
    "qwen3_moe": _QWEN_MOE,
    "smollm3": _LLAMA_LIKE,
    "vit": _vision("vit"),
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Look up the architecture of a ``config.json``.

    Raises:
        ModelError: it is not supported; says which are and how to describe a new one.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {kind!r} is not supported (supported: {', '.join(ARCHITECTURES)})",
            "describe it by one entry in secateur.architecture; docs/prune.md shows how",
        )
    return ARCHITECTURES[kind]
