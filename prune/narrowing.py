"""The prune stage of structured methods: a smaller model, written block by block."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from secateur.artifact import LayerFacts
from secateur.checkpoint import CONFIG, save_tensors, write_index, write_json
from secateur.errors import UsageError, did_you_mean
from secateur.layer_sizes import with_layer_sizes
from secateur.progress import progress
from secateur.prune.adapt import METHOD as _adapt
from secateur.prune.compensate import COMPENSATIONS, bias_of_removed, refitted
from secateur.prune.flap import METHOD as _flap
from secateur.prune.llm_pruner import METHOD as _llm_pruner
from secateur.prune.narrowed import NarrowedModel, Survey
from secateur.prune.shape import Kept, Shape, common_sizes
from secateur.prune.shortgpt import METHOD as _shortgpt
from secateur.prune.sleb import METHOD as _sleb
from secateur.prune.structured import Budget, Choice, StructuredMethod
from secateur.recipe import Prune, validate
from secateur.walk import Walk

STRUCTURED: dict[str, StructuredMethod] = {
    method.name: method for method in (_adapt, _llm_pruner, _flap, _shortgpt, _sleb)
}
CHOICE = "choice.safetensors"


def is_structured(method: str) -> bool:
    """Whether a method or chain makes matrices smaller."""
    return method.partition("+")[0] in STRUCTURED


def find_structured(prune: Prune) -> tuple[StructuredMethod, Any, str | None]:
    """The method of a recipe, its settings and its compensation.

    Raises:
        UsageError: a word, setting or pattern that does not go with it.
    """
    first, *later = prune.method.split("+")
    method = STRUCTURED[first]
    for word in later:
        if word not in COMPENSATIONS:
            raise UsageError(
                f"{word!r} cannot follow {first!r}, which makes matrices smaller",
                did_you_mean(word, COMPENSATIONS),
            )
    if len(later) > 1 or (later and method.removes == "blocks"):
        raise UsageError(
            f"{prune.method!r} makes up for what is gone in more than one way"
            if len(later) > 1
            else f"{first!r} removes whole blocks, which nothing makes up for",
            f"choose {first}" + ("" if method.removes == "blocks" else f"+{later[0]}"),
        )
    pattern = prune.pattern
    if pattern.is_nm or pattern.is_dense or pattern.rows > 1:
        raise UsageError(
            f"{first!r} removes heads, channels or blocks, and the pattern is {pattern}",
            "give a P% pattern: the part of the weights in all blocks that goes, e.g. 20%",
        )
    own = {key.partition(".")[2]: value for key, value in prune.settings.items()}
    for key in prune.settings:
        if key.partition(".")[0] != first:
            known = [f"{first}.{field}" for field in type(method.settings).model_fields]
            raise UsageError(f"the setting {key!r} is not {first!r}'s", did_you_mean(key, known))
    settings = validate(type(method.settings), own, f"settings of {first}")
    return method, settings, later[0] if later else None


@dataclass
class Narrowing:
    """A structured run in its partial directory.

    Args:
        path: the directory.
        model: the original model.
        inputs: calibration samples.
        prune: the recipe's section.
        quiet: show no progress.
    """

    path: Path
    model: NarrowedModel
    inputs: Mapping[str, torch.Tensor]
    prune: Prune
    quiet: bool

    def choose(self) -> Choice:
        """Decide what is kept; an earlier run's choice is taken up."""
        method, settings, _ = find_structured(self.prune)
        original = self.model.original
        target = math.floor(original.weights * float(1 - self.prune.pattern.removed))
        budget = Budget(target, self.prune.multiple)
        survey = Survey(self.model, self.inputs, self.prune.compat, quiet=self.quiet)
        choice = start = self._read_choice()
        if start is None or not start.done:
            for choice in method.function(survey, budget, settings, start):
                self._write_choice(choice)
        assert choice is not None
        if choice.shape.weights > target:
            raise UsageError(
                f"{method.name} leaves {choice.shape.weights:,} weights at the least, and "
                f"{target:,} are asked for",
                "remove less, or spare fewer blocks",
            )
        return choice

    def _write_choice(self, choice: Choice) -> None:
        tensors = {"removed": torch.tensor(choice.removed, dtype=torch.float64)}
        for index, kept in enumerate(choice.shape.blocks):
            if kept is not None:
                tensors[f"{index}.groups"] = kept.groups.clone()
                tensors[f"{index}.channels"] = kept.channels.clone()
        tensors["done"] = torch.tensor(choice.done)
        tensors |= {f"facts.{key}": torch.tensor(value) for key, value in choice.facts.items()}
        save_tensors(self.path / CHOICE, tensors)

    def _read_choice(self) -> Choice | None:
        if not (self.path / CHOICE).exists():
            return None
        tensors = load_file(self.path / CHOICE)
        shape = self.model.original
        for index in range(len(shape.blocks)):
            kept = None
            if f"{index}.groups" in tensors:
                kept = Kept(tensors[f"{index}.groups"], tensors[f"{index}.channels"])
            shape = shape.with_block(index, kept)
        facts = {
            key.removeprefix("facts."): value.item()
            for key, value in tensors.items()
            if key.startswith("facts.")
        }
        removed = tuple(tensors["removed"].tolist())
        return Choice(shape, removed, bool(tensors["done"]), facts)

    def write(self, choice: Choice) -> tuple[dict[str, LayerFacts], list[str]]:
        """Write the smaller model; its layers and what is to be said of it."""
        shape = choice.shape
        layers: dict[str, LayerFacts] = {}
        files: list[Path] = []
        for number, (old, tensors) in enumerate(self._blocks(shape)):
            prefix, new = self.model.block_prefix(old), self.model.block_prefix(number)
            renamed = {new + name.removeprefix(prefix): value for name, value in tensors.items()}
            files.append(self._shard(number + 1, len(shape.alive)))
            save_tensors(files[-1], renamed)
            layers |= self._facts(old, prefix, new, tensors, choice)
        checkpoint = self.model.checkpoint
        outside = {name: checkpoint.load(name) for name in self.model.tensor_names(None)}
        files.insert(0, self._shard(0, len(shape.alive)))
        save_tensors(files[0], outside)
        write_index(self.path, files)
        write_json(self.path / CONFIG, self._config(shape))
        for companion in checkpoint.companions():
            shutil.copyfile(companion, self.path / companion.name)
        (self.path / CHOICE).unlink()
        return layers, [self._summary(shape)]

    def _shard(self, number: int, blocks: int) -> Path:
        return self.path / f"model-{number + 1:05}-of-{blocks + 1:05}.safetensors"

    def _blocks(self, shape: Shape) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The tensors of every block that is kept, by name in the original."""
        model, compensation = self.model, find_structured(self.prune)[2]
        walk = Walk(model, self.inputs) if compensation else None
        with progress("writing blocks", self.quiet) as tick:
            for index in shape.alive:
                names = model.tensor_names(index)
                changed = self._compensated(walk, index, shape) if walk and compensation else {}
                model.take(index, shape.blocks[index])
                tensors = {name: model.read(index, name) for name in names} | changed
                if walk:
                    model.load_block(index, tensors.__getitem__)
                    walk.advance(index)
                    model.free_block(index)
                yield index, tensors
                tick(index + 1, len(shape.blocks))
        if walk:
            walk.close()

    def _compensated(self, walk: Walk, index: int, shape: Shape) -> dict[str, torch.Tensor]:
        """New weights or biases of the linears behind what a block loses."""
        model, kept = self.model, shape.blocks[index]
        parts, compensation = model.parts, find_structured(self.prune)[2]
        assert kept is not None
        model.take(index, model.original.blocks[index])
        model.load_block(index)
        prefix, need = model.block_prefix(index), "gram" if compensation == "lsq" else "moments"
        names = {prefix + name: name for name in (parts.output, parts.down)}
        seen = walk.observe(index, list(names), needs=frozenset({"norms", need}))  # type: ignore[arg-type]
        changed = {}
        for full, name in names.items():
            weight = model.linears(index)[full].weight
            numbers = torch.arange(weight.shape[1])[None]
            inside = shape.cut(parts, f"{name}.weight", numbers, kept)[0]
            stored = model.checkpoint.load(f"{full}.weight").dtype
            if compensation == "lsq":
                changed[f"{full}.weight"] = refitted(weight, seen[full].gram, inside).to(stored)
            else:
                own = bias_of_removed(weight, seen[full].mean, inside)
                changed[f"{full}.bias"] = model.read(index, f"{full}.bias") + own.to(stored)
        model.free_block(index)
        return changed

    def _config(self, shape: Shape) -> dict[str, Any]:
        """``config.json`` of the smaller model."""
        model, config = self.model, self.model.checkpoint.config | self.model.changes
        blocks = len(shape.blocks)
        for key in ("layer_types", "no_rope_layers"):
            listed = getattr(model.module.config, key, None)
            if listed is not None and (key in config or len(set(listed)) > 1):
                config[key] = [listed[index] for index in shape.alive]
        if len(shape.alive) < blocks:
            config.pop("max_window_layers", None)
        config["head_dim"] = shape.head_dim
        return with_layer_sizes(config, common_sizes(model), shape.sizes())

    def _facts(
        self, old: int, prefix: str, new: str, tensors: dict[str, torch.Tensor], choice: Choice
    ) -> dict[str, LayerFacts]:
        steps = {self.prune.method: {"block": old, **choice.facts}}
        found = {}
        for name in self.model.linears(old):
            weight = tensors[f"{name}.weight"]
            before = self.model.checkpoint.nbytes(f"{name}.weight")
            found[new + name.removeprefix(prefix)] = LayerFacts(
                shape=(weight.shape[0], weight.shape[1]),
                pattern="dense",
                kept_dense=None if weight.nbytes < before else "none of it was chosen",
                dense_bytes=before,
                bytes=weight.nbytes,
                steps=steps,
            )
        return found

    def _summary(self, shape: Shape) -> str:
        original, sizes = self.model.original, shape.sizes()

        def span(values: list[int]) -> str:
            low, high = min(values), max(values)
            return str(low) if low == high else f"{low} to {high}"

        gone = 1 - shape.weights / original.weights
        return (
            f"{100 * gone:.2f} % of the {original.weights:,} weights of the linears in blocks are "
            f"gone: {len(sizes)} of {len(original.blocks)} blocks, with "
            f"{span([own.kv_heads for own in sizes])} KV heads and "
            f"{span([own.intermediate for own in sizes])} channels"
        )
