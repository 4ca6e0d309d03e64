"""The prune stage itself: model directory in, pruned model directory out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.artifact import Artifact, LayerFacts, Manifest, library_versions, refuse_existing
from secateur.calibration import calibration_inputs
from secateur.checkpoint import Checkpoint, save_tensors
from secateur.device import choose_device
from secateur.errors import UsageError, some
from secateur.model import StreamedModel
from secateur.prune.memory import LIBRARIES, resident
from secateur.prune.narrowed import NarrowedModel
from secateur.prune.narrowing import Narrowing, find_structured, is_structured
from secateur.prune.plan import Plan, allocated, plan_model, steps_of
from secateur.prune.work import MASKS, Work
from secateur.recipe import Calibration, Prune
from secateur.sizes import parse_size
from secateur.source import resolve_model

if TYPE_CHECKING:
    import torch

_SAMPLES = "calibration.safetensors"
_NARROWED_CARD = """# {name}, made smaller by secateur

Method `{method}`: {note}.

An ordinary Hugging Face model. If its blocks differ in size, `config.json` says so in
`per_layer_config`: secateur's engines open it, and transformers after `import secateur`.

The licence and the limits of the original model apply.
"""


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
    """What `prune_model` would do, without reading a weight.

    Raises:
        UsageError: as `prune_model`; or a structured method, which decides by measuring.
    """
    if is_structured(prune.method):
        raise UsageError(
            f"what {prune.method!r} removes is found out by measuring", "drop --dry-run"
        )
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
    if is_structured(prune.method):
        return _narrow(model, Path(output), prune, calibration, overwrite, quiet, cache)
    method, allocation = steps_of(prune)
    refuse_existing(Path(output), overwrite)
    streamed = _open(model, prune, cache)
    plan = plan_model(streamed, prune, calibration)
    checkpoint = streamed.checkpoint
    started = time.monotonic()
    source, recipe, identity = _identity(model, checkpoint, prune, calibration)
    with Artifact(output, identity, overwrite) as artifact:
        work = Work(artifact.path, streamed, plan, method, prune)
        first = work.first_unfinished()
        inputs = _calibration(work, calibration, quiet)
        calibrated = time.monotonic()
        if allocation.needs != "nothing":
            work.plan = plan = allocated(plan, prune, work.allocate(allocation, inputs, quiet))
        work.run(inputs, quiet)
        layers = work.finish([_SAMPLES])
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
            notes=_notes(plan, inputs, layers, calibration),
        )
        (artifact.path / "README.md").write_text(_card(manifest, plan), encoding="utf-8")
        manifest = artifact.commit(manifest, {"seconds": seconds, "resumed_at": first or None})
    return PruneResult(Path(output), manifest, seconds, first or None)


def _narrow(
    model: str,
    output: Path,
    prune: Prune,
    calibration: Calibration,
    overwrite: bool,
    quiet: bool,
    cache: Path | None,
) -> PruneResult:
    """`prune_model` by a structured method."""
    _, _, compensation = find_structured(prune)
    refuse_existing(output, overwrite)
    checkpoint = Checkpoint(resolve_model(model, cache))
    if (checkpoint.path / MASKS).exists():
        raise UsageError(
            f"{checkpoint.path} has masks, which do not survive the removal of heads and channels",
            "remove these first, from the dense model, and prune the result to a pattern",
        )
    if prune.memory is not None:
        raise UsageError(
            f"--memory {prune.memory} cannot be kept: structured methods hold the whole model",
            "drop --memory",
        )
    device, dtype = _place(prune)
    opened = NarrowedModel(checkpoint, device, dtype, biases=compensation == "bias")
    started = time.monotonic()
    source, recipe, identity = _identity(model, checkpoint, prune, calibration)
    with Artifact(output, identity, overwrite) as artifact:
        inputs = _samples(artifact.path, opened, calibration, quiet)
        run = Narrowing(artifact.path, opened, inputs, prune, quiet)
        choice = run.choose()
        chosen = time.monotonic()
        layers, notes = run.write(choice)
        (artifact.path / _SAMPLES).unlink()
        manifest = Manifest(
            kind="narrowed",
            versions=library_versions("torch", "transformers", "safetensors"),
            source=source,
            recipe=recipe,
            seed=calibration.seed,
            layers=layers,
            notes=notes,
        )
        card = _NARROWED_CARD.format(name=source["model"], method=prune.method, note=notes[0])
        (artifact.path / "README.md").write_text(card, encoding="utf-8")
        seconds = {"choice": chosen - started, "writing": time.monotonic() - chosen}
        manifest = artifact.commit(manifest, {"seconds": seconds})
    return PruneResult(output, manifest, seconds)


def _identity(
    model: str, checkpoint: Checkpoint, prune: Prune, calibration: Calibration
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The source and the recipe for the manifest, and what decides the result."""
    hashes = checkpoint.sha256()
    source = {"model": Path(model).name if Path(model).exists() else model, "sha256": hashes}
    recipe = {"calibration": calibration.model_dump(), "prune": prune.model_dump(mode="json")}
    # The same work whatever memory it has.
    identity = {"source": hashes, **recipe} | {"prune": recipe["prune"] | {"memory": None}}
    return source, recipe, identity


def _place(prune: Prune) -> tuple[torch.device, torch.dtype | None]:
    """Where blocks are loaded to, and in which type."""
    import torch

    device = choose_device(prune.device)
    # A CPU computes bf16 and fp16 slowly and coarsely; scores are fp32 in any case.
    return device, torch.float32 if device.type == "cpu" else None


def _open(model: str, prune: Prune, cache: Path | None) -> StreamedModel:
    device, dtype = _place(prune)
    return StreamedModel(Checkpoint(resolve_model(model, cache)), device, dtype)


def _calibration(
    work: Work, calibration: Calibration, quiet: bool
) -> dict[str, torch.Tensor] | None:
    """The calibration samples; None if nothing reads them."""
    if calibration.data == "none":
        _, allocation = steps_of(work.prune)
        readers = {
            f"the method {work.method.name!r}": work.method.needs_text,
            f"the allocation {allocation.name!r}": allocation.needs == "scores",
            "--permute": work.prune.permute,
        }
        if reader := next((name for name, reads in readers.items() if reads), None):
            raise UsageError(
                f"{reader} needs calibration text and --data is 'none'",
                "drop --data (the default, self, needs no file), or use --method magnitude",
            )
        return None
    if not (work.path / _SAMPLES).exists():
        _refuse_large_self(work, calibration)
    return _samples(work.path, work.model, calibration, quiet)


def _samples(
    path: Path, model: StreamedModel, calibration: Calibration, quiet: bool
) -> dict[str, torch.Tensor]:
    """The calibration samples, kept in the partial directory."""
    from safetensors.torch import load_file

    if calibration.data == "none":
        raise UsageError(
            "structured methods need calibration text and --data is 'none'",
            "drop --data (the default, self, needs no file)",
        )
    kept = path / _SAMPLES
    if not kept.exists():
        save_tensors(kept, calibration_inputs(model, calibration, quiet))
    return load_file(kept)


def _refuse_large_self(work: Work, calibration: Calibration) -> None:
    """Writing its own text takes the whole model; say so before it breaks a promise."""
    if calibration.data != "self" or work.prune.memory is None:
        return
    whole = resident() + LIBRARIES + 4 * work.plan.total_weights
    if whole > parse_size(work.prune.memory):
        raise UsageError(
            f"--memory {work.prune.memory} is too little for --data self: the model writes the "
            f"text whole, which takes {whole / 2**30:.1f} GiB",
            "give calibration text with --data FILE",
        )


def _notes(
    plan: Plan,
    inputs: dict[str, torch.Tensor] | None,
    layers: dict[str, LayerFacts],
    calibration: Calibration,
) -> list[str]:
    """What a reader of the result should not have to find out."""
    notes = []
    samples = next(iter(inputs.values())) if inputs else None
    if samples is not None and len(samples) < calibration.samples:
        notes.append(f"{len(samples)} calibration samples: there were no more")
    if inputs and "input_ids" in inputs and inputs["input_ids"].shape[1] < calibration.length:
        notes.append(
            f"calibration length {inputs['input_ids'].shape[1]} instead of {calibration.length}: "
            "capped by the model's context or the length of the text"
        )
    unseen = [
        name for name, facts in layers.items() if "because" in facts.steps.get("magnitude", {})
    ]
    if unseen:
        notes.append(
            f"{len(unseen)} layers pruned by magnitude, as no calibration token was routed to "
            f"their expert: {some(unseen)}"
        )
    reasons: dict[str, list[str]] = {}
    for layer in plan.layers:
        if layer.kept_dense is not None:
            reasons.setdefault(layer.kept_dense, []).append(layer.name)
    for reason, names in reasons.items():
        notes.append(f"{len(names)} layers left dense, {reason}: {some(names)}")
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
