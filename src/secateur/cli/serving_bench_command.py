"""``secateur bench serving``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, bench
from secateur.cli.bench_command import (
    Output,
    Quiet,
    _check_output,
    _console,
    _deliver,
    _where,
    command_line,
)
from secateur.errors import UsageError, did_you_mean
from secateur.progress import progress

if TYPE_CHECKING:
    from secateur.bench.serving_results import ServingResult

_APIS = ("completions", "chat")


@bench.command("serving")
def serving(
    where: Annotated[
        str,
        Argument(help="Address of an OpenAI endpoint, or a model directory to serve meanwhile."),
    ],
    concurrency: Annotated[
        str | None,
        Option(help="Closed loops: requests under way, with commas.", show_default="1,8,32"),
    ] = None,
    rate: Annotated[
        str | None, Option(help="Open loops: requests a second, with commas; inf: all at once.")
    ] = None,
    burstiness: Annotated[
        float, Option(help="Of open loops; 1: Poisson arrivals, less: in bursts.")
    ] = 1.0,
    sweep: Annotated[
        bool, Option("--sweep", help="Double the concurrency until it brings less than 10 %.")
    ] = False,
    requests: Annotated[
        int | None,
        Option(
            help="Requests of each load.",
            show_default="4 a unit of concurrency, 30 s of a rate, 16 at least",
        ),
    ] = None,
    data: Annotated[
        str, Option(help="random, or a .txt, .jsonl or ShareGPT .json file of prompts.")
    ] = "random",
    prompt: Annotated[int, Option(help="Tokens of a random prompt.")] = 128,
    new_tokens: Annotated[
        int | None,
        Option(help="Tokens of an answer.", show_default="64; of a file: as long as its answers"),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        Option(
            "--ignore-eos/--heed-eos",
            help="Whether answers go on to the full length.",
            show_default="with random prompts",
        ),
    ] = None,
    slo: Annotated[
        str, Option(help="Limits in ms for goodput, e.g. ttft:2000,tpot:200,e2el:9000.")
    ] = "",
    model: Annotated[
        str | None, Option(help="Name of the model.", show_default="the endpoint's first")
    ] = None,
    tokenizer: Annotated[
        str | None, Option(help="Model directory whose tokenizer the endpoint uses.")
    ] = None,
    api: Annotated[str, Option(help="completions or chat.")] = "completions",
    engine: Annotated[
        str | None, Option(help="Of a directory: as in `secateur serve`.", show_default="auto")
    ] = None,
    threads: Annotated[
        int | None, Option(min=1, help="Of a directory: CPU threads.", show_default="all cores")
    ] = None,
    seed: Annotated[int, Option(help="Draws random prompts and arrivals.")] = 0,
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure an endpoint under load: latencies, throughput, goodput, as `vllm bench serve` does.

    A key, where one is wanted, is read from OPENAI_API_KEY.

    Example: secateur bench serving packed/ --sweep --slo ttft:2000,tpot:200
    """
    from secateur.bench.serving import ServingSettings, measure_serving, parse_slo
    from secateur.recipe import validate

    if api not in _APIS:
        raise UsageError(f"there is no API {api!r}", did_you_mean(api, _APIS))
    settings = validate(
        ServingSettings,
        {
            "concurrency": _numbers("--concurrency", concurrency, int),
            "rate": _numbers("--rate", rate, float),
            "burstiness": burstiness,
            "sweep": sweep,
            "requests": requests,
            "data": data,
            "prompt": prompt,
            "new_tokens": new_tokens,
            "ignore_eos": ignore_eos,
            "slo": parse_slo(slo),
            "seed": seed,
        },
        "bench serving",
    )
    arguments = [*(["--engine", engine] if engine else [])]
    arguments += [*(["--threads", str(threads)] if threads else [])]
    _check_output(output)
    with progress("requests", quiet) as tick:
        result = measure_serving(
            where,
            settings,
            model=model,
            tokenizer=tokenizer,
            api=api,  # type: ignore[arg-type]
            serve_arguments=arguments,
            command=command_line(),
            progress=tick,
        )
    _deliver(result.to_json(), output, json)
    if not json:
        show_serving(result)


def show_serving(result: ServingResult) -> None:
    """Print a line for each load, then the summaries and the facts."""
    from rich.table import Table

    table = Table("load", box=None)
    titles = ["requests/s", "output tokens/s", "ttft", "p99", "tpot", "p99", "itl p99", "e2el"]
    for title in (*titles, "goodput/s", "failed"):
        table.add_column(title, justify="right", no_wrap=True)
    keys = ("median_ttft", "p99_ttft", "median_tpot", "p99_tpot", "p99_itl", "median_e2el")
    for point in result.points:
        good = "" if point.request_goodput is None else f"{point.request_goodput:.2f}"
        table.add_row(
            point.load,
            f"{point.request_throughput:.2f}",
            f"{point.output_throughput:.1f}",
            *(_ms(point.ms(key)) for key in keys),
            good,
            f"{point.failed} of {point.num_prompts}",
        )
    console = _console()
    console.print(table)
    for line in _facts(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _facts(result: ServingResult) -> list[str]:
    summary = result.mlperf
    said = [
        ("SingleStream, p90 ms", summary.single_stream_p90_ms),
        ("Offline, tokens/s", summary.offline_tokens_per_s),
        ("Server, requests/s", summary.server_requests_per_s),
    ]
    known = [f"{name} {value:.1f}" for name, value in said if value is not None]
    failures = {error for point in result.points for error in point.errors if error}
    return [
        "ttft, tpot, itl, e2el in ms; where nothing else is said medians",
        *([f"knee: {result.knee} at once"] if result.knee else []),
        *([f"as MLPerf looks at it: {'; '.join(known)}"] if known else []),
        f"{result.model} at {result.url}, prompts {result.data}; counted by: "
        + ", ".join(result.counted),
        *([result.ready] if result.ready else []),
        _where(result.environment, "client on this machine"),
        *(f"note: {note}" for note in result.notes),
        *(f"failed: {error}" for error in sorted(failures)),
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _numbers(flag: str, text: str | None, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """Positive numbers between commas."""
    try:
        numbers = tuple(kind(part) for part in (text or "").split(",") if part)
    except ValueError:
        numbers = (0,)
    if any(not number > 0 for number in numbers):
        raise UsageError(f"{flag} {text} is not positive numbers with commas", f"e.g. {flag} 1,8")
    return numbers
