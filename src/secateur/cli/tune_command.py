"""``secateur tune``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from secateur.cli import Json, app, emit
from secateur.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.bench.tune import Point, Target, TuneResult

_UNITS = {"": 1, "s": 1, "min": 60, "h": 3600}


@app.command()
def tune(
    model: Annotated[str, Argument(help="Model directory, .gguf file or hub name.")],
    target_speedup: Annotated[
        float | None, Option(help="Least speed-up of decoding over the model as it is, e.g. 1.8.")
    ] = None,
    max_ppl_increase: Annotated[
        str | None, Option(help="Greatest increase of perplexity, e.g. 10%.")
    ] = None,
    patterns: Annotated[str, Option(help="Patterns to try, with commas.")] = "2:4,4:8,50%@16x1",
    methods: Annotated[
        str, Option(help="Methods to try, CHAIN[:ALLOCATION], the most promising first.")
    ] = "alps,sparsegpt",
    values: Annotated[str, Option(help="Value types to try.")] = "bf16,int8,int4",
    data: Annotated[str, Option(help="Calibration text, as of `secateur prune`.")] = "self",
    samples: Annotated[int, Option(min=1, help="Calibration sequences.")] = 32,
    length: Annotated[int, Option(min=2, help="Tokens per sequence.")] = 512,
    eval_: Annotated[
        str, Option("--eval", help="Text whose perplexity counts; not the one for calibration.")
    ] = "pydoc",
    window: Annotated[int, Option(min=2, help="Tokens per window.")] = 512,
    windows: Annotated[int, Option(min=1, help="Windows to read.")] = 16,
    prompt: Annotated[int, Option(min=1, help="Prompt tokens, of speeds.")] = 128,
    new_tokens: Annotated[int, Option(min=1, help="Tokens decoded after it, of speeds.")] = 32,
    budget: Annotated[str, Option(help="Time after which nothing new is begun: 90min, 2h.")] = "2h",
    work: Annotated[Path, Option(help="Directory for what is finished.")] = Path("tune.work"),
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path, Option("--output", "-o", help="Recipe to write for `secateur run`.")
    ] = Path("recipe.yaml"),
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: Json = False,
) -> None:
    """Search for the pattern, method and value type that keep a target; write the recipe.

    Repeated, it goes on where it was cut off. Exit code 5: nothing that was tried keeps the target.

    Example: secateur tune my-model --target-speedup 1.8 -o recipe.yaml
    """
    import yaml
    from rich.console import Console
    from rich.live import Live

    from secateur.bench.method_results import split_entries
    from secateur.bench.recovery import parse_share
    from secateur.bench.tune import Target, find_front
    from secateur.bench.tune import tune as search
    from secateur.cli.bench_command import command_line
    from secateur.recipe import Accuracy, Calibration, Latency, validate

    increase = None if max_ppl_increase is None else parse_share(max_ppl_increase)
    target = Target(target_speedup, increase)
    seconds = _seconds(budget)
    text = {"data": data, "samples": samples, "length": length}
    reading = {"data": eval_, "window": window, "windows": windows}
    console = Console(stderr=True, quiet=quiet)
    with Live(console=console, auto_refresh=False) as live:
        result = search(
            model,
            target,
            output=output.stem,
            patterns=[part.strip() for part in patterns.split(",")],
            methods=split_entries(methods),
            values=[part.strip() for part in values.split(",")],  # type: ignore[misc]
            calibration=validate(Calibration, text, "calibration"),
            evaluation=validate(Accuracy, reading, "bench.accuracy"),
            latency=Latency(prompt=(prompt,), new_tokens=new_tokens),
            budget_seconds=seconds,
            work=work,
            device=device,
            command=command_line(),
            say=lambda line: live.console.print(line, soft_wrap=True),
            update=lambda points: live.update(
                _table(points, find_front(points), target), refresh=True
            ),
        )
    if result.recipe is None:
        raise _failed(result)
    output.write_text(yaml.safe_dump(result.recipe, sort_keys=False), encoding="utf-8")
    if json:
        emit(result.to_json())
        return
    printed = Console()
    printed.print(_table(result.points, result.front, target))
    best = result.best
    assert best is not None
    printed.print(
        f"best: {best.pattern} {best.method} {best.values}; "
        f"{'all was tried' if result.finished else 'not all was tried in the time'}\n"
        f"recipe: {output}, to be run by `secateur run {output}`",
        soft_wrap=True,
    )


def _seconds(budget: str) -> float:
    match = re.fullmatch(r"([0-9.]+)\s*(s|min|h|)", budget.strip())
    try:
        return float(match[1]) * _UNITS[match[2]] if match else _refuse(budget)
    except ValueError:
        return _refuse(budget)


def _refuse(budget: str) -> float:
    raise UsageError(f"{budget!r} is no time", "write 90min or 2h")


def _table(points: Sequence[Point], front: Sequence[Point], target: Target) -> Table:
    from rich.table import Table

    table = Table("pattern", "values", "method", "x decode", "x bytes", "x perplexity", "")
    for column in table.columns[3:6]:
        column.justify = "right"
    for point in points:
        speed, quality = point.speed, point.perplexity_ratio
        said = point.error or " ".join(
            word
            for word, there in (
                ("target kept", target.kept(point)),
                ("front", point in front),
                ("quality not measured", quality is None),
            )
            if there
        )
        table.add_row(
            point.pattern,
            point.values,
            point.method or "",
            f"{speed.decode_speedup.value:.2f}" if speed else "",
            f"{speed.bytes / speed.dense_bytes:.2f}" if speed else "",
            f"{quality.value:.3f}" if quality else "",
            said,
        )
    return table


def _failed(result: TuneResult) -> GateFailed:
    measured = [point for point in result.points if point.speed is not None]
    failed = next((point.error for point in result.points if point.error), None)
    asked = (
        f"a speed-up of {result.limit:g}"
        if result.target == "speedup"
        else f"{100 * result.limit:g} % more perplexity at most"
    )
    if result.target == "speedup":
        speeds = [point.speed.decode_speedup.value for point in measured if point.speed]
        nearest = f"the fastest has {max(speeds):.2f}" if speeds else "nothing could be run"
    else:
        ratios = [p.perplexity_ratio.value for p in measured if p.perplexity_ratio]
        nearest = f"the least is {100 * (min(ratios) - 1):.1f} %" if ratios else "none was measured"
    return GateFailed(
        f"nothing that was tried keeps {asked}: {nearest if measured or not failed else failed}",
        "try other --patterns, --methods or --values, a longer --budget, or ask for less",
        result.to_json(),
    )
