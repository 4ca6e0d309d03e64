"""``secateur prune`` and ``secateur methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TextIO

from typer import Argument, Option

from secateur.cli import Json, app, emit, parse_pattern_rules, parse_settings

if TYPE_CHECKING:
    from secateur.artifact import LayerFacts
    from secateur.prune import Plan, PruneResult

_PATTERN = (
    "N:M keeps N of M, P% removes P percent; with @Rx1 (R = 4, 8, 16) for R rows at once; dense."
)


@app.command()
def prune(
    model: Annotated[str, Argument(help="Model directory, .gguf file or Hugging Face hub name.")],
    output: Annotated[str, Option("--output", "-o", help="Directory to make.")],
    method: Annotated[
        str, Option(help="A method and its refinements, joined by +; see `secateur methods`.")
    ] = "alps",
    set_: Annotated[
        list[str] | None,
        Option("--set", help="Setting of a step, e.g. dsnot.cycles=20; repeatable."),
    ] = None,
    pattern: Annotated[str, Option(help=_PATTERN)] = "2:4",
    layer: Annotated[
        list[str] | None,
        Option(
            help="Exception 'GLOB=PATTERN' by layer name, e.g. '*.down_proj=dense'; repeatable."
        ),
    ] = None,
    data: Annotated[
        str,
        Option(
            help="Calibration text: self (written by the model), pydoc, a .txt or .jsonl file, "
            "wikitext2, c4, a data set on the hub, or none."
        ),
    ] = "self",
    samples: Annotated[int, Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, Option(help="Decides which text is drawn.")] = 0,
    allocate: Annotated[
        str,
        Option(help="How P% is spread over the blocks: uniform, owl or alphapruning."),
    ] = "uniform",
    permute: Annotated[
        bool, Option("--permute", help="Reorder channels so that N:M keeps more; free at run time.")
    ] = False,
    multiple: Annotated[
        int, Option(help="Structured methods: widths of MLPs are multiples of this.")
    ] = 16,
    memory: Annotated[
        str | None,
        Option(help="Peak memory, e.g. 2GiB; a promise.", show_default="what there is"),
    ] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    compat: Annotated[
        str, Option(help="exact, or reference: count as the authors' code does.")
    ] = "exact",
    strict: Annotated[
        bool, Option("--strict", help="Refuse if a layer cannot hold its pattern (else: dense).")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what would be done to each layer, and stop.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: Json = False,
) -> None:
    """Prune a model: decide which weights go, and write it with zeros in their place."""
    from secateur.prune import plan, prune_model
    from secateur.recipe import Calibration, Prune, validate

    wanted = validate(
        Prune,
        {
            "method": method,
            "settings": parse_settings(set_ or []),
            "pattern": pattern,
            "layers": parse_pattern_rules(layer or []),
            "strict": strict,
            "allocate": allocate,
            "permute": permute,
            "multiple": multiple,
            "memory": memory,
            "compat": compat,
            "device": device,
        },
        "prune",
    )
    text = validate(
        Calibration,
        {"data": data, "samples": samples, "length": length, "seed": seed},
        "calibration",
    )
    if dry_run:
        planned = plan(model, wanted, text)
        emit(planned.model_dump(mode="json")) if json else _show_plan(planned)
        return
    result = prune_model(model, output, wanted, text, overwrite=overwrite, quiet=quiet)
    if json:
        emit(
            {
                "output": str(result.output),
                "seconds": result.seconds,
                "resumed_at": result.resumed_at,
                "manifest": result.manifest.model_dump(mode="json", by_alias=True),
            }
        )
    else:
        show_pruned(result)


@app.command()
def methods(json: Json = False) -> None:
    """List the pruning methods, the refinements that can follow them, and the allocations."""
    from rich.console import Console
    from rich.table import Table

    from secateur.prune import ALLOCATIONS, METHODS, REFINEMENTS, STRUCTURED

    rows: list[dict[str, Any]] = []
    steps: list[Any] = [*METHODS.values(), *REFINEMENTS.values(), *STRUCTURED.values()]
    steps += ALLOCATIONS.values()
    for step in steps:
        kind = "refinement" if step.name in REFINEMENTS else "method"
        kind = "structured" if step.name in STRUCTURED else kind
        needs = step.needs
        if step.name in ALLOCATIONS:
            kind, needs = "allocation", {"nothing": (), "scores": ("norms",)}.get(needs, (needs,))
        rows.append(
            {
                "name": step.name,
                "kind": kind,
                "summary": step.summary,
                "source": step.source,
                "needs": sorted(needs),
                "settings": step.settings.model_dump(),
            }
        )
    if json:
        emit(rows)
        return
    table = Table("name", "what it does", "reads", "source", box=None)
    prefixes = {"method": "", "refinement": "+", "structured": "", "allocation": "--allocate "}
    for row in rows:
        reads = ", ".join(row["needs"]) or "nothing"
        table.add_row(prefixes[row["kind"]] + row["name"], row["summary"], reads, row["source"])
    Console().print(table)
    print("Chain a method and refinements: --method wanda+lsq")
    print("Structured methods make matrices smaller: --method adapt+lsq --pattern 20%")


def _show_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "shape", "pattern", "removes", "kept dense because", box=None)
    for layer in plan.layers:
        removed = float(layer.pattern.removed)
        table.add_row(
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            str(layer.pattern),
            f"{removed * layer.weights:,.0f}" if removed else "",
            layer.kept_dense or "",
        )
    console = Console()
    console.print(table)
    linear = sum(layer.weights for layer in plan.layers)
    console.print(
        f"{len(plan.pruned)} of {len(plan.layers)} linear layers in {plan.blocks} blocks will be "
        f"pruned: {100 * plan.sparsity:.2f} % of their {linear / 1e6:,.1f} M weights, "
        f"{100 * plan.sparsity * linear / plan.total_weights:.2f} % of the model's "
        f"{plan.total_weights / 1e6:,.1f} M; about {plan.peak_bytes / 2**30:.2f} GiB of memory",
        soft_wrap=True,
    )


def _masked_cells(facts: list[LayerFacts]) -> list[str]:
    weights = sum(fact.shape[0] * fact.shape[1] for fact in facts)
    zeros = sum(fact.sparsity * fact.shape[0] * fact.shape[1] for fact in facts)
    errors = [fact.relative_error for fact in facts if fact.relative_error is not None]
    return [
        ", ".join(sorted({fact.pattern for fact in facts})),
        f"{100 * zeros / weights:.2f} %",
        f"{sum(errors) / len(errors):.4f}" if errors else "",
        f"{max(errors):.4f}" if errors else "",
    ]


def _narrowed_cells(facts: list[LayerFacts]) -> list[str]:
    sides = [sorted({fact.shape[side] for fact in facts}) for side in (0, 1)]
    spans = [f"{side[0]} … {side[-1]}" if len(side) > 1 else str(side[0]) for side in sides]
    left = sum(fact.bytes for fact in facts) / sum(fact.dense_bytes for fact in facts)
    return [" x ".join(spans), f"{100 * (1 - left):.2f} %"]


def show_pruned(result: PruneResult, file: TextIO | None = None) -> None:
    """Print a summary: a line for each kind of layer."""
    from rich.console import Console
    from rich.table import Table

    groups: dict[str, list[str]] = {}
    layers = result.manifest.layers
    for name in layers:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    narrowed = result.manifest.kind == "narrowed"
    heads = ["shapes", "removed"] if narrowed else ["pattern", "zeros", "output error", "worst"]
    table = Table("linear", "layers", *heads, box=None)
    for kind, names in groups.items():
        facts = [layers[name] for name in names]
        cells = _narrowed_cells(facts) if narrowed else _masked_cells(facts)
        table.add_row(kind, str(len(facts)), *cells)
    console = Console(file=file)
    console.print(table)
    for note in result.manifest.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if result.resumed_at:
        console.print(f"resumed at block {result.resumed_at}")
    seconds = sum(result.seconds.values())
    console.print(f"pruned model in {result.output} ({seconds:.0f} s)", soft_wrap=True)
