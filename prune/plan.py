"""The plan of a pruning run: every linear layer with what will be done to it, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

from secateur.errors import ModelError, UsageError
from secateur.model import StreamedModel
from secateur.pattern import Pattern
from secateur.prune.methods import find_method
from secateur.recipe import Calibration, Prune

if TYPE_CHECKING:
    from secateur.checkpoint import Checkpoint


class LayerPlan(BaseModel):
    """What will be done to one linear layer.

    Attributes:
        name: full module name.
        block: index of its decoder block.
        shape: ``(out, in)``.
        pattern: ``dense`` if it is left alone.
        kept_dense: why it is left alone; None if it is pruned.
    """

    name: str
    block: int
    shape: tuple[int, int]
    pattern: Pattern
    kept_dense: str | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class Plan(BaseModel):
    """All layers of a model, and what the run will take.

    Attributes:
        blocks: number of decoder blocks.
        total_weights: parameters of the whole model.
        peak_bytes: estimated peak memory of the walk itself, without the interpreter.
    """

    layers: list[LayerPlan]
    blocks: int
    total_weights: int
    peak_bytes: int

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
    method = find_method(prune.method, prune.settings)
    layers = []
    for index in range(len(model.blocks)):
        for name, linear in model.linears(index).items():
            if f"{name}.weight" not in model.checkpoint:
                raise ModelError(
                    f"{model.checkpoint.path} has no tensor '{name}.weight'",
                    "check that the model was saved completely, by transformers 5 or compatible",
                )
            shape = (linear.out_features, linear.in_features)
            layers.append(_plan_layer(name, index, shape, prune))
    for rule in prune.layers:
        if not any(_matches(rule.match, layer.name) for layer in layers):
            raise UsageError(
                f"the layer rule {rule.match!r} matches no linear layer of this model",
                f"layer names look like {layers[0].name!r}; use * for the parts that vary",
            )
    checkpoint = model.checkpoint
    return Plan(
        layers=layers,
        blocks=len(model.blocks),
        total_weights=sum(_count(checkpoint, name) for name in checkpoint.names()),
        peak_bytes=_peak_bytes(model, calibration, gram="gram" in method.needs),
    )


def _plan_layer(name: str, block: int, shape: tuple[int, int], prune: Prune) -> LayerPlan:
    pattern = prune.pattern_of(name)
    reason = "the recipe says so" if pattern.is_dense else pattern.obstacle(*shape)
    if reason is not None and not pattern.is_dense and prune.strict:
        raise UsageError(
            f"{name} cannot be {pattern}: {reason}",
            "leave it dense by a layer rule, choose another pattern, or drop --strict",
        )
    if reason is not None and not pattern.is_dense:
        reason = f"{pattern} does not fit: {reason}"
    chosen = pattern if reason is None else Pattern()
    return LayerPlan(name=name, block=block, shape=shape, pattern=chosen, kept_dense=reason)


def _matches(glob: str, name: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, glob)


def _count(checkpoint: Checkpoint, name: str) -> int:
    count = 1
    for extent in checkpoint.shape(name):
        count *= extent
    return count


def _peak_bytes(model: StreamedModel, calibration: Calibration, gram: bool) -> int:
    """What the walk holds at its largest.

    One block in fp32 twice, the hidden states of all samples, one sample's activations, and with
    ``gram`` the Gram matrix of every linear's inputs.
    """
    widths: list[int] = []
    blocks = []
    for index in range(len(model.blocks)):
        shapes = [linear.weight.shape for linear in model.linears(index).values()]
        weights = sum(_count(model.checkpoint, name) for name in model.tensor_names(index))
        grams = sum(width**2 for width in {shape[1] for shape in shapes}) if gram else 0
        blocks.append(2 * weights + 2 * grams)
        widths += [max(shape) for shape in shapes]
    outside = sum(_count(model.checkpoint, name) for name in model.tensor_names(None))
    states = calibration.samples * calibration.length * int(model.module.config.hidden_size)
    sample = calibration.length * max(widths) * 8
    return 4 * max(outside, max(blocks) + states + sample)
