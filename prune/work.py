"""The work of a pruning run, block by block, in a directory from which it can be taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.artifact import LayerFacts
from secateur.bits import pack_mask
from secateur.checkpoint import CONFIG, merge_tensors, save_tensors, write_index, write_json
from secateur.errors import ModelError
from secateur.gradients import gradient_file, regional_gradients, stream_gradients
from secateur.model import Channels, Linear, StreamedModel
from secateur.progress import progress
from secateur.prune.allocate import Allocation, patterns_of
from secateur.prune.method import NORMS, Method, Problem, RegionStep
from secateur.prune.methods import METHODS, gradient_norm
from secateur.prune.permute import (
    find_permutation,
    find_shared_permutation,
    output_columns,
    permuted_tensors,
    value_rows,
)
from secateur.prune.plan import LayerPlan, Plan, bears
from secateur.prune.regions import RecordedRegion, record_regions
from secateur.recipe import Prune
from secateur.statistics import GradientNorms, gradient_scale
from secateur.walk import Walk

if TYPE_CHECKING:
    import torch

    from secateur.pattern import Pattern
    from secateur.statistics import InputStatistics

MASKS = "masks.safetensors"
MEASURES = "measures.json"
STATES = "states-pruned"
# Channels that change places together; more take too long for the little that they gain.
_ASSIGNED = 4096
# Scores that the search for an order looks at; of larger layers it takes every k-th row.
_SCORES = 1 << 23


@dataclass
class Work:
    """A run in its partial directory: one shard, one mask file and one fact file a block.

    Args:
        path: the directory.
        model: the model to prune.
        plan: what to do to each linear.
        method: how.
        prune: the recipe's section.
    """

    path: Path
    model: StreamedModel
    plan: Plan
    method: Method
    prune: Prune

    def shard(self, block: int | None) -> Path:
        """The weight file of a block; None: of everything outside the blocks."""
        number = 1 if block is None else block + 2
        return self.path / f"model-{number:05}-of-{self.plan.blocks + 1:05}.safetensors"

    def mask_file(self, block: int) -> Path:
        """The packed masks of a block."""
        return self.path / f"masks-{block:05}.safetensors"

    def fact_file(self, block: int) -> Path:
        """The facts of a block's layers; the last of its files to be written."""
        return self.path / f"facts-{block:05}.json"

    def first_unfinished(self) -> int:
        """The first block without a fact file."""
        block = 0
        while block < self.plan.blocks and self.fact_file(block).exists():
            block += 1
        return block

    def run(self, inputs: Mapping[str, torch.Tensor] | None, quiet: bool) -> None:
        """Prune all blocks that are not finished yet."""
        from safetensors.torch import load_file

        first, blocks = self.first_unfinished(), self.plan.blocks
        if first == blocks:
            return
        norm = gradient_norm(self.method)
        if norm is not None and inputs is not None:
            half = self.prune.compat == "reference"
            spill = self.plan.memory.spill
            with progress("computing gradients", quiet) as tick:
                stream_gradients(
                    self.model, inputs, norm, self.path, half=half, spill=spill, tick=tick
                )
        walk = self._walk(inputs) if inputs is not None else None
        with progress("pruning blocks", quiet) as tick:
            for block in range(blocks):
                if block >= first:
                    self.model.load_block(block)
                    self.model.prefetch(block + 1)
                    _Block(self, block, walk).prune()
                elif walk:  # earlier work: only its output is needed
                    self.model.load_block(block, load_file(self.shard(block)).__getitem__)
                if walk and block + 1 < blocks:
                    walk.advance(block)
                self.model.free_block(block)
                tick(block + 1, blocks)
        if walk:
            walk.close()

    def allocate(
        self, allocation: Allocation, inputs: Mapping[str, torch.Tensor] | None, quiet: bool
    ) -> list[Pattern]:
        """The pattern of each block, by measures of the dense model."""
        file = self.path / MEASURES
        bearers = [layer for layer in self.plan.layers if bears(layer, self.prune)]
        weights = [0] * self.plan.blocks
        for layer in bearers:
            weights[layer.block] += layer.weights
        if not file.exists():
            walk = None
            if allocation.needs == "scores" and inputs is not None:
                walk = self._walk(inputs)
            measures = []
            with progress(f"measuring blocks ({allocation.name})", quiet) as tick:
                for block in range(self.plan.blocks):
                    self.model.load_block(block)
                    linears = self.model.linears(block)
                    own = [layer.name for layer in bearers if layer.block == block]
                    seen = walk.observe(block, own, advance=True, needs=NORMS) if walk else {}
                    matrices = [linears[name].weight.float() for name in own]
                    if allocation.needs == "scores":
                        norms = [seen[name].square_norm.sqrt() for name in own]
                        matrices = [w.abs() * n for w, n in zip(matrices, norms, strict=True)]
                    measure = allocation.measure(matrices, self.prune.compat) if own else 0.0
                    measures.append(measure)
                    self.model.free_block(block)
                    tick(block + 1, self.plan.blocks)
            if walk:
                walk.close()
            write_json(file, measures)
        measures = json.loads(file.read_text(encoding="utf-8"))
        bearing = [block for block in range(self.plan.blocks) if weights[block]]
        ratios = allocation.ratios(
            [measures[block] for block in bearing],
            [weights[block] for block in bearing],
            float(self.prune.pattern.removed),
            self.prune.compat,
        )
        patterns = [self.prune.pattern] * self.plan.blocks
        for block, pattern in zip(bearing, patterns_of(ratios, self.prune.pattern), strict=True):
            patterns[block] = pattern
        return patterns

    def _walk(self, inputs: Mapping[str, torch.Tensor]) -> Walk:
        features = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        spill = self.path / STATES if self.plan.memory.spill else None
        return Walk(self.model, features, self.method.needs, spill)

    def finish(self, leftovers: list[str]) -> dict[str, LayerFacts]:
        """Complete the model directory, remove what was only needed to resume; all facts.

        Args:
            leftovers: other files of the directory that were only needed to resume.
        """
        checkpoint = self.model.checkpoint
        outside = {name: checkpoint.load(name) for name in self.model.tensor_names(None)}
        save_tensors(self.shard(None), outside)
        blocks = range(self.plan.blocks)
        write_index(self.path, [self.shard(None), *map(self.shard, blocks)])
        merge_tensors(self.path / MASKS, map(self.mask_file, blocks))
        for companion in [checkpoint.path / CONFIG, *checkpoint.companions()]:
            shutil.copyfile(companion, self.path / companion.name)
        facts: dict[str, LayerFacts] = {}
        for block in blocks:
            read = json.loads(self.fact_file(block).read_text(encoding="utf-8"))
            facts |= {name: LayerFacts.model_validate(fact) for name, fact in read.items()}
        for block in blocks:
            self.mask_file(block).unlink()
            self.fact_file(block).unlink()
            gradient_file(self.path, block).unlink(missing_ok=True)
        spilled = self.path.glob("states-*")  # of a run that was killed
        for file in [*spilled, *(self.path / name for name in [*leftovers, MEASURES])]:
            file.unlink(missing_ok=True)
        return facts


@dataclass
class _Block:
    """One block while it is pruned.

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
