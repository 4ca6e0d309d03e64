"""The plan of a pruning run: every linear layer with what will be done to it, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, Field

from secateur.errors import ModelError, UsageError
from secateur.layer_sizes import PER_LAYER
from secateur.model import Linear, StreamedModel
from secateur.pattern import Pattern
from secateur.prune.allocate import Allocation, find_allocation
from secateur.prune.memory import MemoryPlan, plan_memory
from secateur.prune.method import Method
from secateur.prune.methods import find_method
from secateur.recipe import Calibration, Prune
from secateur.sizes import parse_size


class LayerPlan(BaseModel):
    """What will be done to one linear layer.

    Attributes:
        name: full module name.
        block: index of its decoder block.
        shape: ``(out, in)``.
        pattern: ``dense`` if it is left alone.
        kept_dense: why it is left alone; None if it is pruned.
        transposed: whether the checkpoint holds it as ``[in, out]``.
    """

    name: str
    block: int
    shape: tuple[int, int]
    pattern: Pattern
    kept_dense: str | None = None
    transposed: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class Plan(BaseModel):
    """All layers of a model, and what the run will take.

    Attributes:
        blocks: number of decoder blocks.
        total_weights: parameters of the whole model.
        peak_bytes: the peak memory that is expected.
        memory: what is held in memory.
    """

    layers: list[LayerPlan]
    blocks: int
    total_weights: int
    peak_bytes: int
    memory: MemoryPlan = Field(exclude=True)

    @property
    def pruned(self) -> list[LayerPlan]:
        """The layers that will be pruned."""
        return [layer for layer in self.layers if layer.kept_dense is None]

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of all linears in blocks that will be removed."""
        removed = sum(layer.weights * float(layer.pattern.removed) for layer in self.pruned)
        return removed / max(1, sum(layer.weights for layer in self.layers))


def plan_model(model: StreamedModel, prune: Prune, calibration: Calibration) -> Plan:
    """Decide for every linear in the decoder blocks what will be done to it.

    Raises:
        UsageError: an unknown method; a layer rule matches nothing; or, with ``strict``, a layer
            cannot hold its pattern.
        ModelError: the checkpoint lacks a layer's weight.
    """
    method, allocation = steps_of(prune)
    if allocation.needs != "nothing" and (prune.pattern.is_nm or prune.pattern.is_dense):
        raise UsageError(
            f"pattern '{prune.pattern}' leaves nothing to allocate by {allocation.name!r}",
            "give a P% pattern, or drop --allocate",
        )
    if prune.permute and not prune.pattern.is_nm:
        raise UsageError(
            f"channels are permuted for N:M patterns, and the pattern is {prune.pattern}",
            "drop --permute, or give a pattern like 2:4",
        )
    if prune.permute and PER_LAYER in model.checkpoint.config:
        raise UsageError(
            "channels of blocks with different sizes are not permuted",
            "drop --permute; or permute first, and remove heads and channels then",
        )
    if prune.permute and not model.channels(0):
        raise UsageError(
            f"no channels of {model.checkpoint.config['model_type']!r} can be permuted",
            "drop --permute",
        )
    layers = []
    for index in range(len(model.blocks)):
        for name, linear in model.linears(index).items():
            if f"{name}.weight" not in model.checkpoint:
                raise ModelError(
                    f"{model.checkpoint.path} has no tensor '{name}.weight'",
                    "check that the model was saved completely, by transformers 5 or compatible",
                )
            layers.append(_plan_layer(linear, index, prune))
    for rule in prune.layers:
        if not any(_matches(rule.match, layer.name) for layer in layers):
            raise UsageError(
                f"the layer rule {rule.match!r} matches no linear layer of this model",
                f"layer names look like {layers[0].name!r}; use * for the parts that vary",
            )
    checkpoint = model.checkpoint
    length = _positions(model) or calibration.length
    budget = None if prune.memory is None else parse_size(prune.memory)
    memory = plan_memory(model, layers, method, calibration.samples, length, budget)
    return Plan(
        layers=layers,
        blocks=len(model.blocks),
        total_weights=sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()),
        peak_bytes=memory.peak_bytes,
        memory=memory,
    )


def steps_of(prune: Prune) -> tuple[Method, Allocation]:
    """The method and the allocation of a recipe, with their settings.

    Raises:
        UsageError: a word or setting that is not known.
    """
    prefix = f"{prune.allocate}."
    own = {key: value for key, value in prune.settings.items() if key.startswith(prefix)}
    rest = {key: value for key, value in prune.settings.items() if key not in own}
    allocation = find_allocation(
        prune.allocate, {key.removeprefix(prefix): value for key, value in own.items()}
    )
    return find_method(prune.method, rest), allocation


def allocated(plan: Plan, prune: Prune, patterns: Sequence[Pattern]) -> Plan:
    """The plan with a pattern for each block in place of the recipe's.

    Layers that a rule gives another pattern, and those that are left dense, stay as they are.
    """
    layers = [
        layer.model_copy(update={"pattern": patterns[layer.block]})
        if bears(layer, prune)
        else layer
        for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": layers})


def bears(layer: LayerPlan, prune: Prune) -> bool:
    """Whether a layer has the recipe's own pattern, which an allocation spreads."""
    return layer.kept_dense is None and layer.pattern == prune.pattern


def _positions(model: StreamedModel) -> int | None:
    """Patches of an image and the class token; None of a text model."""
    if model.architecture.reads == "text":
        return None
    config = model.module.config
    return int((config.image_size // config.patch_size) ** 2) + 2


def _plan_layer(linear: Linear, block: int, prune: Prune) -> LayerPlan:
    pattern = prune.pattern_of(linear.name)
    if linear.router:
        reason: str | None = "it routes tokens to experts"
    elif pattern.is_dense:
        reason = "the recipe says so"
    else:
        reason = pattern.obstacle(*linear.shape)
        if reason is not None and prune.strict:
            raise UsageError(
                f"{linear.name} cannot be {pattern}: {reason}",
                "leave it dense by a layer rule, choose another pattern, or drop --strict",
            )
        reason = reason and f"{pattern} does not fit: {reason}"
    return LayerPlan(
        name=linear.name,
        block=block,
        shape=linear.shape,
        pattern=pattern if reason is None else Pattern(),
        kept_dense=reason,
        transposed=linear.transposed,
    )


def _matches(glob: str, name: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, glob)
