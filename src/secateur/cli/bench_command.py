"""``secateur bench accuracy`` and ``secateur bench latency``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, bench, emit
from secateur.errors import UsageError
from secateur.progress import progress

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.bench import AccuracyResult, LatencyResult
    from secateur.bench.results import Environment, Estimate

Models = Annotated[list[str], Argument(help="Model directories: dense, pruned or packed.")]
Against = Annotated[str | None, Option(help="Directory of the dense model to compare with.")]
Timed = Annotated[list[str], Argument(help="Model directories, also ONNX; .gguf files.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Output = Annotated[Path | None, Option("--output", "-o", help="Also write the JSON to this file.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress on stderr.")]


@bench.command("accuracy")
def accuracy(
    models: Models,
    against: Against = None,
    data: Annotated[
        str,
        Option(help="Text: pydoc, a .txt or .jsonl file, wikitext2, c4, or a data set on the hub."),
    ] = "pydoc",
    window: Annotated[int, Option(help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None, Option(help="Tokens between window starts.", show_default="the window")
    ] = None,
    windows: Annotated[
        int | None, Option(help="Read only this many windows.", show_default="all")
    ] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Device = "auto",
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure perplexity, and KL divergence and top-1 agreement with a dense model."""
    from secateur.bench import measure_accuracy
    from secateur.recipe import Accuracy, validate

    settings = validate(
        Accuracy,
        {"data": data, "window": window, "stride": stride, "windows": windows},
        "bench accuracy",
    )
    _check_output(output)
    with progress("windows", quiet) as tick:
        result = measure_accuracy(
            models, settings, against=against, dtype=dtype, device=device, progress=tick
        )
    _deliver(result.to_json(), output, json)
    if not json:
        show_accuracy(result)


@bench.command("latency")
def latency(
    models: Timed,
    against: Against = None,
    engine: Annotated[
        str, Option(help="What runs directories: transformers, native, or auto.")
    ] = "auto",
    prompt: Annotated[int, Option(help="Prompt tokens of the prefill.")] = 128,
    new_tokens: Annotated[int, Option(help="Tokens decoded after it.")] = 32,
    batch: Annotated[int, Option(help="Sequences at once.")] = 1,
    rounds: Annotated[int, Option(help="Interleaved rounds at least.")] = 5,
    min_seconds: Annotated[float, Option(help="Go on with rounds until this much time.")] = 3.0,
    threads: Annotated[
        int | None, Option(min=1, help="CPU threads.", show_default="all cores")
    ] = None,
    head_values: Annotated[
        str, Option(help="Native engine: value type of lm_head, as in `secateur serve`.")
    ] = "auto",
    provider: Annotated[
        list[str] | None,
        Option(help="ONNX Runtime's execution provider, as in `secateur serve`."),
    ] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Device = "auto",
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure prefill and decode speed, the models taking turns in one process."""
    from secateur.bench import measure_latency
    from secateur.recipe import Latency, validate

    settings = validate(
        Latency,
        {
            "prompt": prompt,
            "new_tokens": new_tokens,
            "batch": batch,
            "rounds": rounds,
            "min_seconds": min_seconds,
        },
        "bench latency",
    )
    _check_output(output)
    with progress("rounds", quiet) as tick:
        result = measure_latency(
            models,
            settings,
            against=against,
            engine=engine,
            dtype=dtype,
            device=device,
            threads=threads,
            head_values=head_values,
            providers=provider or (),
            progress=tick,
        )
    _deliver(result.to_json(), output, json)
    if not json:
        show_latency(result)


def show_accuracy(result: AccuracyResult) -> None:
    """Print an accuracy result as a table, with the facts needed to repeat it."""
    from rich.table import Table

    table = Table("model", box=None)
    for title in ("MB", "perplexity", "/ baseline", "KL, nats/token", "top-1 agreement"):
        table.add_column(title, justify="right", no_wrap=True)

    for model in result.everyone:
        ratio = "baseline" if model is result.baseline else _estimate(model.perplexity_ratio)
        table.add_row(
            model.path,
            f"{model.bytes / 1e6:.1f}",
            _estimate(model.perplexity),
            ratio,
            _estimate(model.kl),
            _estimate(model.top1_agreement),
        )
    console = _console()
    console.print(table)
    text = result.text
    for line in (
        f"text {text.name}: {result.windows} windows of {result.window} tokens, stride "
        f"{result.stride}, {result.predicted_tokens} predicted tokens (of {text.tokens} in the "
        "text); ± is one standard error over windows",
        f"tokenizer {text.tokenizer}, no special tokens; sha256 of the evaluated ids {text.sha256}",
        _where(result.environment, result.dtype),
        *(f"note: {note}" for note in result.notes),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def show_latency(result: LatencyResult) -> None:
    """Print a latency result: a line for each model and phase, then warnings and the machine."""
    from rich.table import Table

    table = Table("model", "engine", "phase", box=None)
    for title in ("tokens/s, mean ± σ", "min … max", "speed-up"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in result.everyone:
        for name, ran, phase, rate, speedup in (
            (
                model.path,
                model.engine,
                "prefill",
                model.prefill_tokens_per_s,
                model.prefill_speedup,
            ),
            ("", "", "decode", model.decode_tokens_per_s, model.decode_speedup),
        ):
            times = f"{speedup.value:.3f} ± {speedup.stddev:.3f}" if speedup else ""
            table.add_row(
                name,
                ran,
                phase,
                f"{rate.mean:.2f} ± {rate.stddev:.2f}",
                f"{rate.min:.2f} … {rate.max:.2f}",
                "baseline" if model is result.baseline else times,
            )
    console = _console()
    console.print(table)
    for line in (
        f"prompt {result.prompt}, new tokens {result.new_tokens}, batch {result.batch}; "
        f"{result.rounds} interleaved rounds in {result.measured_seconds:.1f} s; ± is one standard "
        "deviation over rounds",
        f"{_where(result.environment, result.dtype)}, {result.environment.threads} threads, peak "
        f"memory of the process {result.peak_rss_bytes / 2**30:.2f} GiB",
        *(f"note: {note}" for note in result.notes),
        *(f"warning: {model.path}: {text}" for model in result.everyone for text in model.warnings),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.4f}"
    return f"{estimate.value:.4f}{error}"


def _where(environment: Environment, dtype: str) -> str:
    machine = f"{environment.cpu}, {environment.cores} cores"
    if environment.device != "cpu":
        machine = f"{environment.device}, {machine}"
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"{machine}; {versions}; {dtype}"


def _check_output(output: Path | None) -> None:
    """Refuse before the measurement what could not be written after it."""
    if output is not None and not output.resolve().parent.is_dir():
        raise UsageError(
            f"there is no directory {output.parent} for {output.name}",
            f"mkdir -p {output.parent}",
        )


def _deliver(result: dict[str, Any], output: Path | None, json: bool) -> None:
    from secateur.checkpoint import write_json

    if output is not None:
        write_json(output, result)
    if json:
        emit(result)


def _console() -> Console:
    """A console that breaks lines for a terminal only."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 250)
