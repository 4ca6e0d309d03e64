"""Blocks of different sizes in one model, as ``config.json`` says them.

The keys of `KEYS` at the top of ``config.json`` hold for every block; ``per_layer_config``, by the
number of the block, says where one differs. That is transformers' schema; transformers reads it but
builds no model from it. `import secateur` teaches it to, see `secateur.transformers_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.errors import ModelError

PER_LAYER = "per_layer_config"
# Without it transformers cannot even check the config of a Llama.
_ALLOWED = "allow_global_per_layer_attribute_access"
# What a block may differ in, by its name here.
KEYS = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
}


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of one block: query heads, KV heads, channels of the MLP."""

    heads: int
    kv_heads: int
    intermediate: int


def read_layer_sizes(config: dict[str, Any], common: LayerSizes, layers: int) -> list[LayerSizes]:
    """The sizes of every block.

    Args:
        config: the parsed ``config.json``.
        common: what its top-level keys say.
        layers: the number of blocks.

    Raises:
        ModelError: ``per_layer_config`` names other things than sizes, or impossible ones.
    """
    sizes = [asdict(common) for _ in range(layers)]
    names = {key: name for name, key in KEYS.items()}
    for number, changes in (config.get(PER_LAYER) or {}).items():
        for key, value in changes.items():
            if not 0 <= int(number) < layers or key not in names or not isinstance(value, int):
                raise _wrong(f"block {number} of {layers}: {key!r} is {value!r}")
            sizes[int(number)][names[key]] = value
    found = [LayerSizes(**own) for own in sizes]
    for number, own in enumerate(found):
        if min(own.heads, own.kv_heads, own.intermediate) < 1 or own.heads % own.kv_heads:
            raise _wrong(f"block {number} has {own}")
    return found


def with_layer_sizes(
    config: dict[str, Any], common: LayerSizes, sizes: Sequence[LayerSizes]
) -> dict[str, Any]:
    """A ``config.json`` that says these sizes.

    Blocks that are all alike are said at the top, which every program understands; but transformers
    refuses a number of heads there that does not divide ``hidden_size``.

    Args:
        config: the parsed ``config.json``, with an explicit ``head_dim``.
        common: what its top-level keys say.
        sizes: of each block.
    """
    changed = {key: value for key, value in config.items() if key not in (PER_LAYER, _ALLOWED)}
    if len(set(sizes)) == 1 and config["hidden_size"] % sizes[0].heads == 0:
        common = sizes[0]
    changed |= {key: getattr(common, name) for name, key in KEYS.items()}
    changed["num_hidden_layers"] = len(sizes)
    differing: dict[str, dict[str, int]] = {}
    for number, own in enumerate(sizes):
        values = {key: (getattr(own, name), getattr(common, name)) for name, key in KEYS.items()}
        if changes := {key: mine for key, (mine, other) in values.items() if mine != other}:
            differing[str(number).zfill(len(str(len(sizes) - 1)))] = changes
    return changed | ({PER_LAYER: differing, _ALLOWED: True} if differing else {})


def _wrong(what: str) -> ModelError:
    return ModelError(
        f"{PER_LAYER} of config.json: {what}",
        f"it may give {', '.join(KEYS.values())} of each block, and heads in whole KV groups",
    )
