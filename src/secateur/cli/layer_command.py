"""``secateur layer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from secateur.cli import Json, app, emit, parse_settings
from secateur.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from secateur.prune.layer import LayerResult


@app.command()
def layer(
    source: Annotated[
        Path,
        Argument(
            metavar="FILE",
            help="safetensors file with weight [out, in], activations [sequences, tokens, in] and "
            "for gblm grads_per_sample [sequences, out, in].",
        ),
    ],
    method: Annotated[
        str, Option(help="Method or chain, e.g. wanda+swaps+lsq; see `secateur methods`.")
    ] = "wanda",
    pattern: Annotated[
        str, Option(help="N:M keeps N of M, P% removes P percent; with @Rx1 for R rows at once.")
    ] = "2:4",
    compat: Annotated[
        str, Option(help="exact, or reference: what the authors' code does, bugs included.")
    ] = "exact",
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="STEP.KEY=VALUE", help="e.g. dsnot.cycles=50; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="File to write: weight_out, mask_pruned (True = removed)."),
    ] = None,
    json: Json = False,
) -> None:
    """Prune one linear layer outside any model, to try or compare methods."""
    from secateur.prune.layer import prune_layer

    if compat not in ("exact", "reference"):
        raise UsageError(
            f"--compat {compat!r} is not known", did_you_mean(compat, ["exact", "reference"])
        )
    result = prune_layer(
        source,
        output,
        method,
        pattern,
        compat=compat,  # type: ignore[arg-type]
        settings=parse_settings(settings or []),
    )
    if json:
        emit(result.model_dump(mode="json"))
    else:
        _show(result)


def _show(result: LayerResult) -> None:
    from rich.console import Console

    error = result.relative_error
    lines = [
        f"{result.method}, {result.pattern}, {result.shape[0]} x {result.shape[1]}"
        + ("" if result.compat == "exact" else f", compat {result.compat}"),
        f"sparsity {result.sparsity:.6f}",
        "relative error " + ("not measured: no activations" if error is None else f"{error:.6f}"),
        *(f"{key}: {value}" for key, value in result.facts.items()),
    ]
    if result.output is not None:
        lines.append(f"written to {result.output}")
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
