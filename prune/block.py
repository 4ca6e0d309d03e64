"""One block while it is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from secateur.artifact import LayerFacts
from secateur.bits import pack_mask
from secateur.checkpoint import save_tensors, write_json
from secateur.errors import ModelError
from secateur.gradients import gradient_file, regional_gradients
from secateur.prune.method import NORMS, Problem, RegionStep
from secateur.prune.methods import METHODS, gradient_norm
from secateur.prune.permute import (
    find_permutation,
    find_shared_permutation,
    output_columns,
    permuted_tensors,
    value_rows,
)
from secateur.prune.regions import RecordedRegion, record_regions
from secateur.statistics import GradientNorms, gradient_scale

if TYPE_CHECKING:
    import torch

    from secateur.architecture import Channels
    from secateur.model import Linear
    from secateur.pattern import Pattern
    from secateur.prune.plan import LayerPlan
    from secateur.prune.work import Work
    from secateur.statistics import InputStatistics
    from secateur.walk import Walk

# Channels that change places together; more take too long for the little that they gain.
_ASSIGNED = 4096
# Scores that the search for an order looks at; of larger layers it takes every k-th row.
_SCORES = 1 << 23


@dataclass
class Block:
    """A block of a run.

    Its module keeps the dense weights until all statistics are collected; what was solved is in
    ``stored``, as it will be written.
    """

    work: Work
    index: int
    walk: Walk | None
    stored: dict[str, torch.Tensor] = field(init=False)
    linears: dict[str, Linear] = field(init=False)
    layers: list[LayerPlan] = field(init=False)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, LayerFacts] = field(default_factory=dict)
    permuted: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, plan = self.work.model, self.work.plan
        names = model.tensor_names(self.index)
        self.stored = {name: model.checkpoint.load(name) for name in names}
        self.linears = model.linears(self.index)
        self.layers = [layer for layer in plan.layers if layer.block == self.index]

    def prune(self) -> None:
        """Prune it, and leave its files and its new weights behind."""
        for layer in self.layers:
            self._check_finite(layer)
            if layer.kept_dense is not None:
                self._note(layer, 0.0, None, {})
        todo = {layer.name: layer for layer in self.layers if layer.kept_dense is None}
        gradients = self._gradients()
        if self.work.prune.permute and self.walk:
            self._permute(todo, gradients)
        step = self.work.method.regional
        regions = record_regions(self.walk, self.index, todo) if step and self.walk else []
        observed: dict[str, InputStatistics] = {}
        for group in self.work.plan.memory.groups[self.index]:
            inputs = self._solve_group([todo[name] for name in group if name in todo], gradients)
            observed |= inputs if step else {}
            del inputs  # before the next ones are collected
        dense = {name: self.linears[name].weight.clone() for name in observed}
        for name in todo:
            linear = self.linears[name]
            linear.weight.copy_(linear.stored(self.stored[f"{name}.weight"]))
        if step is not None:
            self._reconstruct(step, regions)
            for name, inputs_of in observed.items():
                if inputs_of.tokens == 0:
                    continue
                error = inputs_of.relative_error(dense[name], self.linears[name].weight.float())
                self.facts[name] = self.facts[name].model_copy(update={"relative_error": error})
        self._write()

    def _solve_group(
        self, layers: list[LayerPlan], gradients: Mapping[str, GradientNorms]
    ) -> dict[str, InputStatistics]:
        """Prune linears whose statistics are in memory together; these statistics."""
        if not layers:
            return {}
        names = [layer.name for layer in layers]
        inputs = self.walk.observe(self.index, names) if self.walk else {}
        for layer, following in zip(layers, [*names[1:], ""], strict=True):
            own = inputs.get(layer.name)
            self._solve(layer, own, gradients.get(layer.name))
            if own is not None and own is not inputs.get(following):
                own.forget()
        return inputs

    def _permute(self, todo: Mapping[str, LayerPlan], gradients: dict[str, GradientNorms]) -> None:
        """Reorder the dense block's free channels where an N:M pattern is to follow."""
        import torch

        model, walk = self.work.model, self.walk
        assert walk is not None
        free = [
            channels
            for channels in model.channels(self.index)
            if channels.consumer in todo and todo[channels.consumer].pattern.is_nm
        ]
        seen = walk.observe(self.index, [channels.consumer for channels in free], needs=NORMS)
        for channels in free:
            norms = seen[channels.consumer].square_norm.sqrt()
            score = self.linears[channels.consumer].weight.float().abs() * norms
            pattern = todo[channels.consumer].pattern
            orders = self._orders(channels, score, pattern)
            if orders is None:
                self.permuted[channels.consumer] = {"skipped": f"{pattern} does not fit a head"}
                continue
            moved = int((orders[1] != torch.arange(len(orders[1]), device=score.device)).sum())
            self.permuted[channels.consumer] = {"moved": moved}
            names = [*channels.producers, channels.consumer]
            tensors = {key: self.stored[key] for key in _keys(names) if key in self.stored}
            changed = permuted_tensors(tensors, channels.producers, channels.consumer, *orders)
            self.stored |= changed
            for key, tensor in changed.items():
                name, _, kind = key.rpartition(".")
                linear = self.linears[name]
                target = linear.weight if kind == "weight" else linear.module.get_parameter("bias")
                target.copy_(tensor)
            norms_of = {f"{name}.weight": gradients[name].norms for name in names if gradients}
            if norms_of:
                norms_of |= permuted_tensors(
                    norms_of, channels.producers, channels.consumer, *orders
                )
                for name in names:
                    gradients[name] = replace(gradients[name], norms=norms_of[f"{name}.weight"])

    def _orders(
        self, channels: Channels, score: torch.Tensor, pattern: Pattern
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The orders of the producers' rows and of the consumer's columns; None: none fits."""
        if pattern.rows == 1:  # a sample of the rows of a large layer
            score = score[:: -(-score.numel() // _SCORES)]
        if not channels.heads:
            order = find_permutation(score, pattern, _ASSIGNED)
            return order, order
        heads = int(self.work.model.module.config.num_attention_heads)
        head_dim = score.shape[1] // heads
        if head_dim % pattern.m:
            return None
        kv_heads = self.linears[channels.producers[0]].shape[0] // head_dim
        shared = find_shared_permutation(score, heads, kv_heads, head_dim, pattern)
        return value_rows(shared), output_columns(shared, heads)

    def _check_finite(self, layer: LayerPlan) -> None:
        stored = self.stored[f"{layer.name}.weight"]
        if not stored.isfinite().all():
            raise ModelError(
                f"{layer.name}.weight holds {int((~stored.isfinite()).sum())} NaN or infinite "
                "values",
                "the model is damaged: get it again",
            )

    def _gradients(self) -> dict[str, GradientNorms]:
        """What the method reads of gradients, by name of the linear."""
        from safetensors.torch import load_file

        method, walk = self.work.method, self.walk
        if walk is None:
            return {}
        if "regional" in method.needs:
            return regional_gradients(walk, self.index)
        norm = gradient_norm(method)
        if norm is None:
            return {}
        scale = gradient_scale(self.work.prune.compat == "reference")
        norms = load_file(gradient_file(self.work.path, self.index))
        return {
            name: GradientNorms(norms[name].to(walk.model.device), norm, walk.samples, scale)
            for name in norms
        }

    def _solve(
        self, layer: LayerPlan, inputs: InputStatistics | None, gradients: GradientNorms | None
    ) -> None:
        """Prune one linear; its new weight goes to ``stored``."""
        method, linear = self.work.method, self.linears[layer.name]
        before = linear.weight.float().contiguous()
        because = None
        if inputs is not None and inputs.tokens == 0:
            method, because = METHODS["magnitude"], "no calibration token was routed to it"
        problem = Problem(before, inputs, layer.pattern, self.work.prune.compat, gradients)
        solution = method.solve(problem)
        name = f"{layer.name}.weight"
        after = solution.weight.to(self.stored[name].dtype)
        self.stored[name] = linear.stored(after.cpu())
        self.masks[name] = solution.mask.cpu()
        error = None
        if inputs is not None and inputs.tokens:
            error = inputs.relative_error(before, after.float())
        facts = dict(solution.facts)
        if linear.part != "whole" and inputs is not None:
            facts["tokens"] = inputs.tokens
        if because is not None:
            facts["because"] = because
        self._note(layer, 1 - float(solution.mask.double().mean()), error, {method.name: facts})

    def _reconstruct(self, step: RegionStep, regions: list[RecordedRegion]) -> None:
        """Apply the last word of a chain to each region of the block."""
        for recorded in regions:
            names = [name for name in recorded.linears if f"{name}.weight" in self.masks]
            region = recorded.open({name: self.masks[f"{name}.weight"] for name in names})
            facts = step.function(region, step.settings)
            recorded.close()
            for name in names:
                linear = self.linears[name]
                stored = self.stored[f"{name}.weight"]
                after = linear.weight.to(stored.dtype)
                linear.weight.copy_(after)
                self.stored[f"{name}.weight"] = linear.stored(after.cpu()).contiguous()
                self.facts[name].steps[step.name] = facts

    def _note(
        self, layer: LayerPlan, sparsity: float, error: float | None, steps: dict[str, Any]
    ) -> None:
        size = self.stored[f"{layer.name}.weight"].nbytes
        if layer.name in self.permuted:
            steps = {"permute": self.permuted[layer.name], **steps}
        self.facts[layer.name] = LayerFacts(
            shape=layer.shape,
            pattern=str(layer.pattern),
            kept_dense=layer.kept_dense,
            sparsity=sparsity,
            relative_error=error,
            dense_bytes=size,
            bytes=size,
            steps=steps,
            transposed=layer.transposed,
        )

    def _write(self) -> None:
        work, patterns = self.work, {layer.name: layer.pattern for layer in self.layers}
        save_tensors(work.shard(self.index), self.stored)
        packed = {
            name: pack_mask(mask, patterns[name.removesuffix(".weight")].rows)
            for name, mask in self.masks.items()
        }
        save_tensors(work.mask_file(self.index), packed)
        # In the order of the module tree, whatever order they were solved in.
        facts = {
            layer.name: self.facts[layer.name].model_dump(mode="json") for layer in self.layers
        }
        write_json(work.fact_file(self.index), facts)


def _keys(names: list[str]) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
