"""``config.json`` of the families that the native engine knows, as numbers for its decoder.

Each family is a row of `FAMILIES`: what it adds to a Llama. Defaults are those of transformers'
config classes, for the keys that published models leave out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.checkpoint import CONFIG, read_json
from secateur.errors import ModelError
from secateur.layer_sizes import LayerSizes, read_layer_sizes
from secateur.serve.native.rope import TYPES, Rope, make_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_FALL_BACK = "use --engine transformers, which opens every model"
_NEEDED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
_NEEDED += ["vocab_size"]


@dataclass(frozen=True)
class Family:
    """What a family adds to a Llama.

    Attributes:
        defaults: of keys that its ``config.json`` may leave out.
        windows: which layers have a sliding window: "none", "all", "qwen" (from
            ``max_window_layers`` on), "gemma" (all but every n-th) or "listed".
        gemma: norms of 1 + w, scaled embeddings, four norms a block.
        head_norms: norms of queries and keys.
        qkv_bias: biases of the queries, keys and values whatever the config says.
        fused: q, k and v are one matrix, gate and up another.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: str = "none"
    gemma: bool = False
    head_norms: bool = False
    qkv_bias: bool = False
    fused: bool = False


_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}, windows="all"),
    "qwen2": Family({"num_key_value_heads": 32}, windows="qwen", qkv_bias=True),
    "qwen3": Family({"num_key_value_heads": 32, "head_dim": 128}, windows="qwen", head_norms=True),
    "smollm3": Family(
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
        windows="listed",
    ),
    "gemma2": Family(
        {
            **_GEMMA,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="gemma",
        gemma=True,
    ),
    "gemma3_text": Family(
        {**_GEMMA, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        windows="gemma",
        gemma=True,
        head_norms=True,
    ),
    "phi3": Family({"rms_norm_eps": 1e-5}, windows="all", fused=True),
}


@dataclass(frozen=True)
class Architecture:
    """A model as the decoder needs to know it.

    Attributes:
        family: its row of `FAMILIES`.
        model_type: its name there.
        sizes: of each layer.
        ropes: the different ropes of its layers.
        layer_ropes: of each layer, which of them; -1: none.
        windows: of each layer, how many tokens a query sees; 0: all before it.
        tied: the head is the embedding.
        biases: names of linears, as ``self_attn.q_proj``, that have one.
        attention_cap, logit_cap: 0: none.
    """

    family: Family
    model_type: str
    hidden: int
    sizes: tuple[LayerSizes, ...]
    head_dim: int
    vocabulary: int
    max_length: int
    epsilon: float
    attention_scale: float
    attention_cap: float
    logit_cap: float
    embedding_scale: float
    activation: str
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]
    windows: tuple[int, ...]
    tied: bool
    biases: frozenset[str]
    eos_token_ids: frozenset[int]


def obstacle(directory: str | Path) -> str | None:
    """Why the native engine cannot run a model, or None if it can; reads ``config.json`` only.

    Raises:
        ModelError: there is no readable ``config.json``.
    """
    return _obstacle(read_json(Path(directory) / CONFIG))


def read_architecture(directory: str | Path) -> Architecture:
    """Read ``config.json`` and ``generation_config.json``.

    Raises:
        ModelError: a file is missing or damaged, or the engine cannot run the model.
    """
    path = Path(directory)
    config = read_json(path / CONFIG)
    if (why := _obstacle(config)) is not None:
        raise ModelError(f"the native engine cannot run {path}: {why}", _FALL_BACK)
    try:
        architecture = _architecture(config, _eos(path, config))
        _check(architecture)
    except (TypeError, ValueError, LookupError, ZeroDivisionError, AttributeError) as fault:
        raise ModelError(
            f"{path / CONFIG} is not a config of {config['model_type']}: {fault!r}",
            "copy the file again",
        ) from fault
    return architecture


def _check(a: Architecture) -> None:
    """What the decoder relies on, by which the cache is measured."""
    extents = {"hidden_size": a.hidden, "num_hidden_layers": len(a.sizes), "head_dim": a.head_dim}
    extents |= {"max_position_embeddings": a.max_length}
    for key, extent in extents.items():
        if extent < 1:
            raise ValueError(f"{key} is {extent}")
    if a.head_dim > 1024:
        raise ValueError(f"a head_dim of {a.head_dim}, of at most 1024")


def _obstacle(config: dict[str, Any]) -> str | None:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return f"model type {kind!r} is none of {', '.join(FAMILIES)}"
    if missing := [key for key in _NEEDED if not isinstance(config.get(key), int)]:
        return f"config.json has no {missing[0]!r}"
    method = config.get("quantization_config", {}).get("quant_method", "secateur")
    if method != "secateur":
        return f"its weights are quantised by {method!r}"
    name = _activation(config)
    if name not in _ACTIVATIONS:
        return f"activation {name!r} is none of {', '.join(_ACTIVATIONS)}"
    if config.get("use_bidirectional_attention"):
        return "its attention is bidirectional"
    return _rope_obstacle(config)


def _rope_obstacle(config: dict[str, Any]) -> str | None:
    for parameters in _rope_parameters(config).values():
        kind = parameters["rope_type"]
        if kind not in TYPES:
            return f"rope type {kind!r} is none of {', '.join(TYPES)}"
        if missing := [key for key in TYPES[kind][1] if parameters.get(key) is None]:
            return f"rope type {kind!r} has no {missing[0]!r}"
        if config["model_type"] == "phi3" and kind != "default":
            return f"a phi3 with rope type {kind!r}"
        partial = parameters.get("partial_rotary_factor") or 1.0
        if partial != 1 and config["model_type"] != "phi3":
            return f"a {config['model_type']} with a partial_rotary_factor of {partial}"
    return None


def _activation(config: dict[str, Any]) -> str:
    defaults = FAMILIES[config["model_type"]].defaults
    if "hidden_activation" in defaults:
        return str(config.get("hidden_activation") or defaults["hidden_activation"])
    return str(config.get("hidden_act") or "silu")


def _rope_parameters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The complete parameters of each layer type that has its own; "" stands for all others."""
    defaults = FAMILIES[config["model_type"]].defaults
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    length = config.get("max_position_embeddings") or 2048
    nested = {key: value for key, value in given.items() if isinstance(value, dict)}
    theta = config.get("rope_theta") or defaults.get("rope_theta", 10000.0)
    if config["model_type"] == "gemma3_text" and not nested:
        local = config.get("rope_local_base_freq") or defaults["rope_local_base_freq"]
        nested = {"full_attention": given, "sliding_attention": {"rope_theta": local}}
    common: dict[str, Any] = {
        "rope_theta": theta,
        "max_position_embeddings": length,
        "original_max_position_embeddings": length,
    }
    if config.get("partial_rotary_factor") is not None:
        common["partial_rotary_factor"] = config["partial_rotary_factor"]
    complete = {}
    for kind, own in (nested or {"": given}).items():
        found = {key: value for key, value in own.items() if value is not None}
        complete[kind] = common | {"rope_type": found.get("type", "default")} | found
        if config.get("original_max_position_embeddings"):
            trained = config["original_max_position_embeddings"]
            complete[kind]["original_max_position_embeddings"] = trained
    return complete


def _eos(path: Path, config: dict[str, Any]) -> frozenset[int]:
    generation = path / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.exists() else None
    found = config.get("eos_token_id") if found is None else found
    return frozenset([] if found is None else found if isinstance(found, list) else [found])


def _architecture(config: dict[str, Any], eos: frozenset[int]) -> Architecture:
    family = FAMILIES[config["model_type"]]
    get = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}.get
    hidden, heads, layers = (
        int(config[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = get("head_dim") or hidden // heads
    kinds = _layer_types(config, layers)
    parameters = _rope_parameters(config)
    names = list(parameters)
    used = get("no_rope_layers") or [
        (i + 1) % int(get("no_rope_layer_interval", 4)) for i in range(layers)
    ]
    unturned = [config["model_type"] == "smollm3" and not used[i] for i in range(layers)]
    window = config["sliding_window"] if "sliding_window" in config else get("sliding_window")
    length = int(get("max_position_embeddings") or 2048)
    kv_heads = int(get("num_key_value_heads") or heads)
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(f"{heads} heads for {kv_heads} KV heads")
    common = LayerSizes(heads, kv_heads, int(config["intermediate_size"]))
    return Architecture(
        family=family,
        model_type=config["model_type"],
        hidden=hidden,
        sizes=tuple(read_layer_sizes(config, common, layers)),
        head_dim=head_dim,
        vocabulary=int(config["vocab_size"]),
        max_length=length,
        epsilon=float(get("rms_norm_eps", 1e-6)),
        attention_scale=float(get("query_pre_attn_scalar", head_dim) if family.gemma else head_dim)
        ** -0.5,
        attention_cap=_cap(config, "attn_logit_softcapping") if not family.head_norms else 0.0,
        logit_cap=_cap(config, "final_logit_softcapping"),
        embedding_scale=math.sqrt(hidden) if family.gemma else 1.0,
        activation=_ACTIVATIONS[_activation(config)],
        ropes=tuple(make_rope(own, head_dim) for own in parameters.values()),
        layer_ropes=tuple(
            -1 if unturned[i] else names.index(kinds[i] if "" not in parameters else "")
            for i in range(layers)
        ),
        windows=tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds),
        tied=bool(get("tie_word_embeddings", False)),
        biases=_biases(config, family),
        eos_token_ids=eos,
    )


def _cap(config: dict[str, Any], key: str) -> float:
    defaults = FAMILIES[config["model_type"]].defaults
    return float((config[key] if key in config else defaults.get(key)) or 0.0)


def _layer_types(config: dict[str, Any], layers: int) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for each layer."""
    family = FAMILIES[config["model_type"]]
    if family.windows == "none":
        return ["full_attention"] * layers
    if family.windows == "all":
        return ["sliding_attention"] * layers
    off = family.windows in ("qwen", "listed") and not config.get("use_sliding_window")
    if off:
        return ["full_attention"] * layers
    if listed := config.get("layer_types"):
        return [str(listed[i]) for i in range(layers)]
    if family.windows == "gemma":
        every = config.get("sliding_window_pattern")
        every = int(every or family.defaults["sliding_window_pattern"])
        slides = [(i + 1) % every != 0 for i in range(layers)]
    elif family.windows == "qwen":
        slides = [i >= int(config.get("max_window_layers", 28)) for i in range(layers)]
    else:
        slides = [not used for used in config.get("no_rope_layers") or [1] * layers]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _biases(config: dict[str, Any], family: Family) -> frozenset[str]:
    names: list[str] = []
    if config.get("attention_bias") and not family.fused:
        names += [f"self_attn.{part}_proj" for part in "qkvo"]
    if family.qkv_bias:
        names += [f"self_attn.{part}_proj" for part in "qkv"]
    if config.get("mlp_bias"):
        names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return frozenset(names)
