"""Healing: a pruned model is trained a little towards the dense one, and keeps its masks.

One loop over windows of a text, under accelerate. Every few steps the divergence from the dense
model on windows that are not trained on is measured; the best weights so far and all that a later
run needs to go on are kept. Afterwards every mask is checked against what was written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from secateur.architecture import architecture_of
from secateur.artifact import MANIFEST, Artifact, Manifest, library_versions, refuse_existing
from secateur.bits import unpack_mask
from secateur.calibration import read_text, token_ids
from secateur.checkpoint import CONFIG, INDEX, Checkpoint, save_tensors
from secateur.errors import ModelError, UsageError
from secateur.model import load_causal_lm, load_tokenizer
from secateur.pattern import Pattern
from secateur.progress import progress
from secateur.prune.training import Training
from secateur.recipe import Heal
from secateur.source import resolve_model

if TYPE_CHECKING:
    from secateur.artifact import LayerFacts

MASKS = "masks.safetensors"
STATE = "training.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class HealResult:
    """What `heal_model` made.

    Attributes:
        output: the healed model directory.
        manifest: its manifest.
        before, after: KL from the dense model per token, on windows that were not trained on.
        tokens: how many were trained on.
        steps: how many were done, of those planned.
        stopped_early: whether the divergence had stopped falling.
        seconds: of this run.
    """

    output: Path
    manifest: Manifest
    before: float
    after: float
    tokens: int
    steps: tuple[int, int]
    stopped_early: bool
    seconds: float


def heal_model(
    model: str | Path,
    output: str | Path,
    heal: Heal,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    cache: Path | None = None,
) -> HealResult:
    """Train a pruned or narrowed model towards its dense teacher.

    A run that was cut off goes on after its last measurement when it is repeated.

    Args:
        model: directory that `secateur prune` wrote.
        output: directory to make; must not exist unless ``overwrite``.
        heal: the recipe's section.
        quiet: show no progress.
        cache: where a teacher that is a .gguf file is imported to.

    Raises:
        UsageError: an output that exists, settings that do not fit the models.
        ModelError: a model or text that is missing, damaged, packed already or too short, or a
            teacher with another vocabulary.
    """
    started = time.monotonic()
    refuse_existing(Path(output), overwrite)
    source = Checkpoint(model)
    facts = _healable(source)
    teacher = _teacher(heal, facts, cache)
    hashes = source.sha256() | _mask_hash(source)
    recipe = facts.recipe | {"heal": heal.model_dump(mode="json")}
    identity = {"source": hashes, "teacher": teacher.sha256(), "heal": recipe["heal"]}
    with Artifact(output, identity, overwrite) as artifact:
        masks = read_masks(source.path, facts.layers)
        run = Training(
            student=load_causal_lm(source.path, torch.float32),
            teacher=load_causal_lm(teacher.path, torch.float32),
            blocks=architecture_of(source.config).blocks,
            masks=masks,
            text=token_ids(load_tokenizer(source.path), read_text(heal.data)),
            heal=heal,
            path=artifact.path,
        )
        with progress("healing", quiet) as tick:
            outcome = run.run(tick)
        _write(artifact.path, source, run.weights())
        check_masks(artifact.path, masks)
        for leftover in (STATE, BEST):
            (artifact.path / leftover).unlink(missing_ok=True)
        notes = [*facts.notes, *_notes(outcome, teacher, facts)]
        healed = {name: _healed(own, outcome) for name, own in facts.layers.items()}
        manifest = Manifest(
            kind=facts.kind,
            versions=library_versions("torch", "transformers", "safetensors", "accelerate"),
            source={"model": source.path.name, "sha256": hashes, "teacher": teacher.sha256()},
            recipe=recipe,
            seed=heal.seed,
            layers=healed,
            notes=notes,
        )
        card = f"# {source.path.name}, healed by secateur\n\n" + "".join(f"- {n}\n" for n in notes)
        (artifact.path / "README.md").write_text(card, encoding="utf-8")
        seconds = time.monotonic() - started
        manifest = artifact.commit(manifest, {"seconds": seconds})
    return HealResult(Path(output), manifest, seconds=seconds, **outcome)


def _healable(source: Checkpoint) -> Manifest:
    if (source.path / MANIFEST).exists():
        facts = Manifest.read(source.path)
        if facts.kind in ("pruned", "narrowed"):
            return facts
    raise ModelError(
        f"{source.path} is no directory that `secateur prune` wrote",
        "heal a pruned model, and compile it afterwards",
    )


def _mask_hash(source: Checkpoint) -> dict[str, str]:
    from secateur.checkpoint import file_sha256

    masks = source.path / MASKS
    return {MASKS: file_sha256(masks)} if masks.exists() else {}


def _teacher(heal: Heal, facts: Manifest, cache: Path | None) -> Checkpoint:
    if heal.teacher is None and "/" not in str(facts.source.get("model")):
        raise UsageError(
            f"where the dense model {facts.source.get('model')!r} lies is not known",
            "give it with --teacher",
        )
    return Checkpoint(resolve_model(heal.teacher or str(facts.source["model"]), cache))


def read_masks(directory: Path, layers: dict[str, LayerFacts]) -> dict[str, torch.Tensor]:
    """The keep-masks of a pruned directory by name of the weight, as the weights are stored.

    Raises:
        ModelError: a mask is damaged.
    """
    if not (directory / MASKS).exists():
        return {}
    found = {}
    for name, bits in load_file(directory / MASKS).items():
        layer = layers.get(name.removesuffix(".weight"))
        try:
            if layer is None:
                raise ValueError("no layer of the manifest")
            mask = unpack_mask(bits, layer.shape[1], Pattern.parse(layer.pattern).rows)
        except ValueError as fault:
            raise ModelError(f"{MASKS}: {name!r}: {fault}", "prune the model again") from fault
        found[name] = mask.t() if layer.transposed else mask
    return found


def check_masks(directory: Path, masks: dict[str, torch.Tensor]) -> None:
    """Prove that no removed weight of a directory is anything but 0.

    Raises:
        RuntimeError: one is; names its layer.
    """
    checkpoint = Checkpoint(directory)
    for name, mask in masks.items():
        if checkpoint.load(name)[~mask].any():
            raise RuntimeError(f"healing revived removed weights of {name}")


def _write(output: Path, source: Checkpoint, trained: dict[str, torch.Tensor]) -> None:
    """The source directory with the trained weights in the place of its own."""
    for file in source.files:
        names = [name for name in source.names() if source.file_of(name) == file]
        tensors = {name: source.load(name) for name in names}
        changed = {name: trained[name].to(tensors[name].dtype) for name in names if name in trained}
        save_tensors(output / file.name, tensors | changed)
    others = [source.path / CONFIG, source.path / INDEX, source.path / MASKS, *source.companions()]
    for file in others:
        if file.exists():
            shutil.copyfile(file, output / file.name)


def _notes(outcome: dict[str, Any], teacher: Checkpoint, facts: Manifest) -> Iterator[str]:
    done, planned = outcome["steps"]
    yield (
        f"healed on {outcome['tokens']:,} tokens: KL from the dense model per token "
        f"{outcome['before']:.4f} before, {outcome['after']:.4f} after"
    )
    if outcome["stopped_early"]:
        yield f"stopped after {done} of {planned} steps, as it fell no further"
    if facts.source.get("sha256") not in (None, teacher.sha256()) and "teacher" not in facts.source:
        yield f"the teacher {teacher.path.name} is not the model that was pruned"


def _healed(layer: LayerFacts, outcome: dict[str, Any]) -> LayerFacts:
    steps = layer.steps | {"heal": {"tokens": outcome["tokens"]}}
    return layer.model_copy(update={"steps": steps, "relative_error": None})
