"""``secateur heal``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TextIO

from typer import Argument, Option

from secateur.cli import Json, app, emit

if TYPE_CHECKING:
    from secateur.prune import HealResult


@app.command()
def heal(
    model: Annotated[str, Argument(help="Directory that `secateur prune` wrote.")],
    output: Annotated[str, Option("--output", "-o", help="Directory to make.")],
    teacher: Annotated[
        str | None,
        Option(help="The dense model.", show_default="the hub's, if it was pruned from there"),
    ] = None,
    data: Annotated[
        str, Option(help="Text to train on: pydoc, a .txt or .jsonl file, wikitext2, c4 …")
    ] = "wikitext2",
    tokens: Annotated[int, Option(help="How many are trained on; the budget.")] = 160_000,
    length: Annotated[int, Option(help="Tokens per sequence.")] = 256,
    batch: Annotated[int, Option(help="Sequences per step.")] = 2,
    at_once: Annotated[int, Option(help="Sequences in memory at once.")] = 2,
    train: Annotated[
        str, Option(help="kept: all kept weights; lora: low rank under the masks; norms.")
    ] = "kept",
    rank: Annotated[int, Option(help="lora: rank of the change of a matrix.")] = 16,
    rate: Annotated[float, Option(help="Highest learning rate.")] = 2e-4,
    hidden: Annotated[float, Option(help="Weight of the blocks' outputs in the loss.")] = 0.0,
    held_out: Annotated[int, Option(help="Sequences that are measured on instead.")] = 8,
    every: Annotated[
        int, Option(help="Steps between measurements; an interrupted run resumes there.")
    ] = 50,
    patience: Annotated[int, Option(help="Stop after this many without improvement.")] = 3,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False,
    precision: Annotated[str, Option(help="Of the computation: fp32 or bf16.")] = "fp32",
    device: Annotated[str, Option(help="auto or cpu.")] = "auto",
    seed: Annotated[int, Option(help="Decides the order of the text.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: Json = False,
) -> None:
    """Train the kept weights of a pruned model towards the dense one; its masks stay."""
    settings = dict(locals())
    from secateur.prune import heal_model
    from secateur.recipe import Heal, validate

    wanted = validate(
        Heal, {key: settings[key] for key in Heal.model_fields if key in settings}, "heal"
    )
    result = heal_model(model, output, wanted, overwrite=overwrite, quiet=quiet)
    if json:
        manifest = result.manifest.model_dump(mode="json", by_alias=True)
        facts = {key: value for key, value in asdict(result).items() if key != "manifest"}
        emit({**facts, "output": str(result.output), "manifest": manifest})
    else:
        show_healed(result)


def show_healed(result: HealResult, file: TextIO | None = None) -> None:
    """Print what it was worth."""
    for note in result.manifest.notes:
        print(f"note: {note}", file=file)
    print(f"healed model in {result.output} ({result.seconds:.0f} s)", file=file)
