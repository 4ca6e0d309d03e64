"""The work of a pruning run, block by block, in a directory from which it can be taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.artifact import LayerFacts
from secateur.checkpoint import CONFIG, merge_tensors, save_tensors, write_index, write_json
from secateur.gradients import gradient_file, stream_gradients
from secateur.model import StreamedModel
from secateur.progress import progress
from secateur.prune.allocate import Allocation, patterns_of
from secateur.prune.block import Block
from secateur.prune.method import NORMS, Method
from secateur.prune.methods import gradient_norm
from secateur.prune.plan import Plan, bears
from secateur.recipe import Prune
from secateur.walk import Walk

if TYPE_CHECKING:
    import torch

    from secateur.pattern import Pattern

MASKS = "masks.safetensors"
MEASURES = "measures.json"
STATES = "states-pruned"


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
                    Block(self, block, walk).prune()
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
