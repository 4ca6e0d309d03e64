"""The prune stage itself: model directory in, pruned model directory out."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.artifact import Artifact, LayerFacts, Manifest, library_versions, refuse_existing
from secateur.bits import pack_mask
from secateur.calibration import draw_windows, read_text, self_generated, token_ids
from secateur.checkpoint import (
    CONFIG,
    Checkpoint,
    merge_tensors,
    save_tensors,
    write_index,
    write_json,
)
from secateur.device import choose_device
from secateur.errors import ModelError, UsageError
from secateur.model import StreamedModel, load_causal_lm, load_tokenizer
from secateur.progress import progress
from secateur.prune.method import Method, Problem
from secateur.prune.methods import find_method
from secateur.prune.plan import LayerPlan, Plan, plan_model
from secateur.recipe import Calibration, Prune
from secateur.source import resolve_model
from secateur.walk import Walk

if TYPE_CHECKING:
    import torch

    from secateur.statistics import InputStatistics

MASKS = "masks.safetensors"
_TOKENS = "calibration.safetensors"


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What `prune_model` made.

    Attributes:
        output: the pruned model directory.
        manifest: its manifest.
        seconds: time spent in this run, by part.
        resumed_at: the block at which earlier work was taken up; None if there was none.
    """

    output: Path
    manifest: Manifest
    seconds: dict[str, float]
    resumed_at: int | None = None


def plan(model: str, prune: Prune, calibration: Calibration, cache: Path | None = None) -> Plan:
    """What `prune_model` would do, without reading a weight."""
    return plan_model(_open(model, prune, cache), prune, calibration)


def prune_model(
    model: str,
    output: str | Path,
    prune: Prune | None = None,
    calibration: Calibration | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    cache: Path | None = None,
) -> PruneResult:
    """Prune a model, block by block.

    The result is decided by the arguments alone: the same model, recipe and seed give the same
    bytes. A run that was cut off goes on after its last finished block when it is repeated.

    Args:
        model: model directory, .gguf file or hub name.
        output: directory to make; must not exist unless ``overwrite``.
        prune, calibration: the recipe's sections.
        quiet: show no progress.
        cache: where a .gguf file is imported to.

    Raises:
        UsageError: unknown method, a rule that matches nothing, an output that exists.
        ModelError: a model or text that is missing, damaged or unsupported.
    """
    prune, calibration = prune or Prune(), calibration or Calibration()
    method = find_method(prune.method, prune.settings)
    if "gradients" in method.needs:
        raise UsageError(
            f"{method.name!r} needs gradients, which `secateur prune` does not compute yet",
            "use another method; `secateur layer` takes gradients from a file",
        )
    refuse_existing(Path(output), overwrite)
    streamed = _open(model, prune, cache)
    plan = plan_model(streamed, prune, calibration)
    checkpoint = streamed.checkpoint
    started = time.monotonic()
    source = {"model": Path(model).name if Path(model).exists() else model}
    source["sha256"] = checkpoint.sha256()  # type: ignore[assignment]
    recipe = {"calibration": calibration.model_dump(), "prune": prune.model_dump(mode="json")}
    identity = {"source": source["sha256"], **recipe}
    with Artifact(output, identity, overwrite) as artifact:
        work = _Work(artifact.path, streamed, plan, method, prune)
        first = work.first_unfinished()
        tokens = _calibration_tokens(work, calibration, quiet)
        calibrated = time.monotonic()
        work.run(tokens, quiet)
        layers = work.finish()
        seconds = {
            "calibration": calibrated - started,
            "prune": time.monotonic() - calibrated,
        }
        manifest = Manifest(
            kind="pruned",
            versions=library_versions("torch", "transformers", "safetensors"),
            source=source,
            recipe=recipe,
            seed=calibration.seed,
            layers=layers,
            notes=_notes(plan, tokens, calibration),
        )
        (artifact.path / "README.md").write_text(_card(manifest, plan), encoding="utf-8")
        manifest = artifact.commit(manifest, {"seconds": seconds, "resumed_at": first or None})
    return PruneResult(Path(output), manifest, seconds, first or None)


def _open(model: str, prune: Prune, cache: Path | None) -> StreamedModel:
    import torch

    device = choose_device(prune.device)
    # A CPU computes bf16 and fp16 slowly and coarsely; scores are fp32 in any case.
    dtype = torch.float32 if device.type == "cpu" else None
    return StreamedModel(Checkpoint(resolve_model(model, cache)), device, dtype)


@dataclass
class _Work:
    """A run in its partial directory: one shard, one mask file and one fact file a block."""

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
        return self.path / f"masks-{block:05}.safetensors"

    def fact_file(self, block: int) -> Path:
        return self.path / f"facts-{block:05}.json"

    def first_unfinished(self) -> int:
        """A block is finished once its fact file, the last to be written, is there."""
        block = 0
        while block < self.plan.blocks and self.fact_file(block).exists():
            block += 1
        return block

    def run(self, tokens: torch.Tensor | None, quiet: bool) -> None:
        """Prune all blocks that are not finished yet."""
        from safetensors.torch import load_file

        first, blocks = self.first_unfinished(), self.plan.blocks
        if first == blocks:
            return
        needs = self.method.needs
        walk = Walk(self.model, tokens, needs) if tokens is not None else None
        with progress("pruning blocks", quiet) as tick:
            for block in range(blocks):
                if block >= first:
                    self.model.load_block(block)
                    self._prune_block(block, walk.observe(block) if walk else {})
                elif walk:  # earlier work: only its output is needed
                    self.model.load_block(block, load_file(self.shard(block)).__getitem__)
                if walk and block + 1 < blocks:
                    walk.advance(block)
                self.model.free_block(block)
                tick(block + 1, blocks)

    def _prune_block(self, block: int, inputs: dict[str, InputStatistics]) -> None:
        import torch

        checkpoint = self.model.checkpoint
        tensors = {name: checkpoint.load(name) for name in self.model.tensor_names(block)}
        linears = self.model.linears(block)
        masks, facts = {}, {}
        for layer in self.plan.layers:
            if layer.block != block:
                continue
            weight_name = f"{layer.name}.weight"
            stored = tensors[weight_name]
            if not torch.isfinite(stored).all():
                raise ModelError(
                    f"{weight_name} holds {int((~torch.isfinite(stored)).sum())} NaN or infinite "
                    "values",
                    "the model is damaged: get it again",
                )
            size = stored.numel() * stored.element_size()
            if layer.kept_dense is not None:
                facts[layer.name] = _dense_facts(layer, size)
                continue
            linear = linears[layer.name]
            before = linear.weight.detach().float()
            statistics = inputs.get(layer.name)
            solution = self.method.solve(
                Problem(before, statistics, layer.pattern, self.prune.compat)
            )
            after = solution.weight.to(stored.dtype)
            tensors[weight_name] = after.cpu()
            linear.weight.data = after.to(linear.weight.dtype)
            mask = solution.mask.cpu()
            masks[weight_name] = pack_mask(mask, layer.pattern.rows)
            error = None
            if statistics is not None:
                error = statistics.relative_error(before, linear.weight.float())
            facts[layer.name] = LayerFacts(
                shape=layer.shape,
                pattern=str(layer.pattern),
                sparsity=1 - float(mask.float().mean(dtype=torch.float64)),
                relative_error=error,
                dense_bytes=size,
                bytes=size,
                steps={self.method.name: solution.facts},
            )
        save_tensors(self.shard(block), tensors)
        save_tensors(self.mask_file(block), masks)
        written = {name: fact.model_dump(mode="json") for name, fact in facts.items()}
        write_json(self.fact_file(block), written)

    def finish(self) -> dict[str, LayerFacts]:
        """Complete the model directory, remove what was only needed to resume; all facts."""
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
        (self.path / _TOKENS).unlink(missing_ok=True)
        return facts


def _dense_facts(layer: LayerPlan, size: int) -> LayerFacts:
    return LayerFacts(
        shape=layer.shape,
        pattern="dense",
        kept_dense=layer.kept_dense,
        dense_bytes=size,
        bytes=size,
    )


def _calibration_tokens(work: _Work, calibration: Calibration, quiet: bool) -> torch.Tensor | None:
    """The calibration sequences ``[samples, length]``, kept in the partial directory."""
    from safetensors.torch import load_file

    if calibration.data == "none":
        if work.method.needs_text:
            raise UsageError(
                f"the method {work.method.name!r} needs calibration text and --data is 'none'",
                "drop --data (the default, self, needs no file), or use --method magnitude",
            )
        return None
    kept = work.path / _TOKENS
    if not kept.exists():
        save_tensors(kept, {"tokens": _make_tokens(work.model, calibration, quiet)})
    return load_file(kept)["tokens"]


def _make_tokens(model: StreamedModel, calibration: Calibration, quiet: bool) -> torch.Tensor:
    path = model.checkpoint.path
    limit = getattr(model.module.config, "max_position_embeddings", None)
    length = min(calibration.length, limit or calibration.length)
    if calibration.data != "self":
        ids = token_ids(load_tokenizer(path), read_text(calibration.data))
        return draw_windows(ids, calibration.samples, length, calibration.seed)
    config = model.module.config
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if first is None:
        raise ModelError(
            f"{path / CONFIG} names no bos_token_id, so the model cannot start a text by itself",
            "give calibration text with --data FILE",
        )
    first = first[0] if isinstance(first, list) else first
    dense = load_causal_lm(path, model.dtype or "auto").to(model.device)
    with progress("writing calibration text (tokens)", quiet) as tick:
        return self_generated(dense, first, calibration.samples, length, calibration.seed, tick)


def _notes(plan: Plan, tokens: torch.Tensor | None, calibration: Calibration) -> list[str]:
    """What a reader of the result should not have to find out."""
    notes = []
    if tokens is not None and tokens.shape[1] < calibration.length:
        notes.append(
            f"calibration length {tokens.shape[1]} instead of {calibration.length}: "
            "capped by the model's context or the length of the text"
        )
    reasons: dict[str, list[str]] = {}
    for layer in plan.layers:
        if layer.kept_dense is not None:
            reasons.setdefault(layer.kept_dense, []).append(layer.name)
    for reason, names in reasons.items():
        notes.append(f"{len(names)} layers left dense, {reason}: {', '.join(names)}")
    return notes


def _card(manifest: Manifest, plan: Plan) -> str:
    """README.md of the output."""
    prune, calibration = manifest.recipe["prune"], manifest.recipe["calibration"]
    notes = "".join(f"- {note}\n" for note in manifest.notes)
    return f"""# {manifest.source["model"]}, pruned by secateur

{100 * plan.sparsity:.2f} % of the weights of all linear layers in the decoder blocks are zero:
pattern `{prune["pattern"]}`, method `{prune["method"]}`, calibrated on {calibration["samples"]} x
{calibration["length"]} tokens of `{calibration["data"]}`, seed {calibration["seed"]}.

This directory is an ordinary Hugging Face model (the zeros are in place), plus
`masks.safetensors` (which weights were kept) and `manifest.json` (how, layer by layer). It is as
large and as slow as the dense model: `secateur compile` makes it smaller.

The licence and the limits of the original model apply.
{notes}"""
