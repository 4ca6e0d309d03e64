"""A model of which heads and channels can be taken away, and what is measured of it then."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from secateur.errors import ModelError
from secateur.gradients import each_gradient, loss_of
from secateur.model import StreamedModel
from secateur.progress import progress
from secateur.prune.shape import Kept, Shape
from secateur.prune.taylor import Order, TaylorSums, unit_scores
from secateur.statistics import InputStatistics
from secateur.walk import Walk

if TYPE_CHECKING:
    from secateur.architecture import Parts
    from secateur.checkpoint import Checkpoint


_BIASES = {"attention_bias": True, "mlp_bias": True}


class NarrowedModel(StreamedModel):
    """A streamed model whose blocks are loaded as far as they are kept.

    Args:
        biases: give all linears of the blocks a bias, zero where the checkpoint has none.

    Attributes:
        original: the shape of the checkpoint.
        changes: keys of ``config.json`` that follow from ``biases``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None,
        biases: bool = False,
    ) -> None:
        self.changes = _BIASES if biases else {}
        super().__init__(checkpoint, device, dtype, **self.changes)
        self.original = Shape.of(self)
        self._kept = list(self.original.blocks)
        if biases and any(linear.module.bias is None for linear in self.linears(0).values()):
            raise ModelError(
                f"the linears of a {checkpoint.config['model_type']!r} hold no biases",
                "use +lsq instead of +bias",
            )

    @property
    def parts(self) -> Parts:
        """Which linear of a block is which."""
        assert self.architecture.parts is not None  # else it has no shape
        return self.architecture.parts

    def take(self, index: int, kept: Kept | None) -> None:
        """Give a block, which must not be loaded, the sizes of what is kept."""
        assert kept is not None
        self._kept[index] = kept
        prefix, shape, parts = self.block_prefix(index), self.original, self.parts
        queries = len(kept.groups) * shape.rep * shape.head_dim
        rows = {parts.queries: queries} | dict.fromkeys(parts.gates, len(kept.channels))
        rows |= dict.fromkeys((parts.keys, parts.values), len(kept.groups) * shape.head_dim)
        columns = {parts.output: queries, parts.down: len(kept.channels)}
        for full, linear in self.linears(index).items():
            name, module = full.removeprefix(prefix), linear.module
            assert isinstance(module, torch.nn.Linear)
            module.out_features = rows.get(name, module.out_features)
            module.in_features = columns.get(name, module.in_features)
            module.weight = _empty(module.out_features, module.in_features)
            if module.bias is not None:
                module.bias = _empty(module.out_features)

    def tensor_names(self, index: int | None) -> list[str]:
        """As for every model; of a block with the biases that the checkpoint has not."""
        names = super().tensor_names(index)
        if index is None or not self.changes:
            return names
        return sorted({*names, *(f"{name}.bias" for name in self.linears(index))})

    def read(self, index: int, name: str) -> torch.Tensor:
        """A tensor of a block by its name in the checkpoint, as far as the block is kept."""
        kept = self._kept[index]
        assert kept is not None
        if name.endswith(".bias") and name not in self.checkpoint:
            weight = name.removesuffix("bias") + "weight"
            tensor = self.checkpoint.load(weight).new_zeros(self.checkpoint.shape(weight)[0])
        else:
            tensor = self.checkpoint.load(name)
        return self.original.cut(
            self.parts, name.removeprefix(self.block_prefix(index)), tensor, kept
        )

    def load_block(self, index: int, read: Callable[[str], torch.Tensor] | None = None) -> None:
        """Fill a block with what is kept of its weights, or by another ``read(name)``."""
        super().load_block(index, read or (lambda name: self.read(index, name)))


def _empty(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model loses with each of its units, by block.

    Attributes:
        groups: of its KV groups, ``[groups]``.
        channels: of its MLP channels, ``[channels]``.
        similarity: mean over tokens of the cosine between a block's input and its output.
    """

    groups: list[torch.Tensor]
    channels: list[torch.Tensor]
    similarity: list[float]


@dataclass
class Survey:
    """Measures of a model on calibration text, for structured methods.

    Args:
        model: the original model.
        inputs: as for `Walk`.
        compat: "reference" pools query heads as the authors of LLM-Pruner and Adapt-Pruner do.
        spill: a directory for hidden states; None: in memory.
        quiet: show no progress.
    """

    model: NarrowedModel
    inputs: Mapping[str, torch.Tensor]
    compat: Literal["exact", "reference"] = "exact"
    spill: Path | None = None
    quiet: bool = True

    @property
    def samples(self) -> int:
        """Number of calibration sequences."""
        return len(next(iter(self.inputs.values())))

    def taylor(self, shape: Shape, order: Order, numbers: Sequence[int] | None = None) -> Scores:
        """Taylor scores of all units of a narrowed model, see `secateur.prune.taylor`.

        Args:
            shape: what is kept; no block is gone.
            order: of the expansion.
            numbers: which calibration sequences; None: all.
        """
        model, parts = self.model, self.model.parts
        blocks = len(shape.blocks)
        for index, kept in enumerate(shape.blocks):
            model.take(index, kept)
        chosen = list(range(self.samples)) if numbers is None else list(numbers)
        groups, channels = [torch.empty(0)] * blocks, [torch.empty(0)] * blocks
        similarity = [0.0] * blocks

        def passed(block: int, before: torch.Tensor, after: torch.Tensor) -> None:
            similarity[block] += mean_cosine(before, after) / len(chosen)

        def finish(block: int, found: Mapping[str, TaylorSums]) -> None:
            prefix = model.block_prefix(block)
            salience = {
                name.removeprefix(prefix): found[name].salience(linear.weight, order)
                for name, linear in model.linears(block).items()
            }
            groups[block], channels[block] = unit_scores(
                salience, parts, shape.rep, shape.head_dim, order, self.compat
            )

        inputs = {name: tensor[chosen] for name, tensor in self.inputs.items()}
        with progress("measuring heads and channels", self.quiet) as tick:
            each_gradient(
                model, inputs, TaylorSums, finish, passed=passed, spill=self.spill, tick=tick
            )
        return Scores(groups, channels, similarity)

    def similarity(self) -> list[float]:
        """Mean over tokens of the cosine between each original block's input and its output."""
        walk = self._walk()
        found = []
        with progress("measuring blocks", self.quiet) as tick:
            for index in range(len(self.model.blocks)):
                self.model.load_block(index)
                before = [walk.states[number] for number in range(walk.samples)]
                walk.advance(index)
                pairs = zip(before, (walk.states[n] for n in range(walk.samples)), strict=True)
                found.append(sum(mean_cosine(*pair) for pair in pairs) / walk.samples)
                self.model.free_block(index)
                tick(index + 1, len(self.model.blocks))
        walk.close()
        return found

    def inputs_of(self, names: Sequence[str]) -> list[dict[str, InputStatistics]]:
        """First and second moments of the inputs of some linears of every original block.

        Args:
            names: of the linears within the block.
        """
        walk = self._walk()
        found = []
        with progress("measuring blocks", self.quiet) as tick:
            for index in range(len(self.model.blocks)):
                self.model.load_block(index)
                prefix = self.model.block_prefix(index)
                full = [prefix + name for name in names]
                seen = walk.observe(index, full, advance=True, needs=frozenset({"moments"}))
                found.append({name: seen[prefix + name] for name in names})
                self.model.free_block(index)
                tick(index + 1, len(self.model.blocks))
        walk.close()
        return found

    def losses_without(
        self, shape: Shape, candidates: Collection[int], sequences: int
    ) -> dict[int, float]:
        """The mean loss of a model without one more of its blocks, for each of the candidates.

        Args:
            shape: what is kept, blocks whole or gone.
            candidates: those that it still has are tried.
            sequences: how many of the calibration sequences are read.
        """
        model = self.model
        inputs = {name: tensor[:sequences] for name, tensor in self.inputs.items()}
        walk = Walk(model, inputs)
        whole = [walk.states[number] for number in range(walk.samples)]
        trials: dict[int, list[torch.Tensor]] = {}
        with progress("leaving blocks out", self.quiet) as tick, torch.no_grad():
            for index in shape.alive:
                model.load_block(index)
                for own in trials.values():
                    own[:] = [walk.run(index, states) for states in own]
                if index in candidates:
                    trials[index] = list(whole)
                whole = [walk.run(index, states) for states in whole]
                model.free_block(index)
                tick(index + 1, len(shape.blocks))
            model.load_outside(head=True)
            found = {
                index: sum(
                    float(loss_of(walk, inputs, number, states))
                    for number, states in enumerate(own)
                )
                / walk.samples
                for index, own in trials.items()
            }
            model.free_outside()
        walk.close()
        return found

    def _walk(self) -> Walk:
        return Walk(self.model, self.inputs, spill=self.spill and self.spill / "states-walk")


def mean_cosine(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean over tokens of the cosine between ``[..., hidden]`` states."""
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return float(cosine.mean())
