"""``secateur bench accuracy`` and ``secateur bench latency``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, bench, emit
from secateur.errors import UsageError
from secateur.progress import progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from secateur.bench import AccuracyResult
    from secateur.bench.results import Environment, Estimate, Gate, Interval

Models = Annotated[
    list[str], Argument(help="Model directories: dense, pruned or packed; or .gguf files.")
]
Against = Annotated[str | None, Option(help="Directory of the dense model to compare with.")]
Timed = Annotated[
    list[str],
    Argument(help="Model directories, also ONNX; .gguf goes to llama.cpp, .onnx to ONNX Runtime."),
]
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
    top_k: Annotated[
        int, Option(help="Likeliest next tokens that are compared with the dense model's.")
    ] = 5,
    tasks: Annotated[
        list[str] | None,
        Option("--task", help="A task of lm-eval, or a .jsonl file of items; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, Option(help="Ask only so many items of each task.", show_default="all")
    ] = None,
    min_recovery: Annotated[
        float | None,
        Option(
            help="End with code 5 if less of the dense accuracy on the tasks is left, e.g. 0.99."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None, Option(help="End with code 5 if perplexity rises by more, e.g. 10%.")
    ] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Device = "auto",
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure perplexity, KL divergence, agreement and zero-shot accuracy beside a dense model."""
    from secateur.bench import measure_accuracy
    from secateur.bench.recovery import check_gates, parse_share, refuse_failed, require_grounds
    from secateur.recipe import Accuracy, validate

    settings = validate(
        Accuracy,
        {
            "data": data,
            "window": window,
            "stride": stride,
            "windows": windows,
            "top_k": top_k,
            "tasks": tasks,
            "limit": limit,
        },
        "bench accuracy",
    )
    increase = None if max_ppl_increase is None else parse_share(max_ppl_increase)
    require_grounds(against, settings.tasks, min_recovery, increase)
    _check_output(output)
    with progress("windows", quiet) as tick:
        result = measure_accuracy(
            models,
            settings,
            against=against,
            dtype=dtype,
            device=device,
            command=command_line(),
            quiet=quiet,
            progress=tick,
        )
    result = check_gates(result, min_recovery, increase)
    failed = any(not gate.passed for gate in result.gates)
    _deliver(result.to_json(), output, json and not failed)
    if not json:
        show_accuracy(result)
    refuse_failed(result)


@bench.command("latency")
def latency(
    models: Timed,
    against: Against = None,
    engine: Annotated[
        str,
        Option(help="What runs directories: transformers, native, auto; openvino: .onnx files."),
    ] = "auto",
    prompt: Annotated[str, Option(help="Prompt tokens of the prefill, e.g. 32,512.")] = "128",
    new_tokens: Annotated[int, Option(help="Tokens decoded after it.")] = 32,
    batch: Annotated[str, Option(help="Sequences at once, e.g. 1,8,32.")] = "1",
    rounds: Annotated[int, Option(help="Interleaved rounds at least.")] = 5,
    min_seconds: Annotated[float, Option(help="Go on with rounds until this much time.")] = 3.0,
    layers: Annotated[
        bool, Option("--layers", help="Also time every linear by itself, a batch of tokens each.")
    ] = False,
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
            layers=layers,
            command=command_line(),
            providers=provider or (),
            progress=tick,
        )
    _deliver(result.to_json(), output, json)
    if not json:
        from secateur.cli.latency_tables import show_latency

        show_latency(result)


def show_accuracy(result: AccuracyResult) -> None:
    """Print an accuracy result as a table, with the facts needed to repeat it."""
    from rich.table import Table

    table = Table("model", box=None)
    top = f"top-{result.top_k}"
    for title in ("MB", "perplexity", "/ baseline", "KL, nats/token", "top-1 agreement", top):
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
            _estimate(model.topk_agreement),
        )
    console = _console()
    console.print(table)
    if result.everyone[0].tasks:
        console.print(_tasks_table(result))
    text = result.text
    for line in (
        f"text {text.name}: {result.windows} windows of {result.window} tokens, stride "
        f"{result.stride}, {result.predicted_tokens} predicted tokens (of {text.tokens} in the "
        "text); ± is one standard error over windows",
        f"tokenizer {text.tokenizer}, no special tokens; sha256 of the evaluated ids {text.sha256}",
        _where(result.environment, result.dtype),
        *(f"gate: {_gate(gate)}" for gate in result.gates),
        *(f"note: {note}" for note in result.notes),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _tasks_table(result: AccuracyResult) -> Table:
    from rich.table import Table

    table = Table("model", "task", box=None)
    for title in ("items", "acc", "acc_norm", "recovery (95 %)"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in result.everyone:
        for number, task in enumerate(model.tasks):
            table.add_row(
                "" if number else model.path,
                task.name,
                str(task.items),
                _estimate(task.acc),
                _estimate(task.acc_norm),
                _interval(task.recovery),
            )
        if len(model.tasks) > 1 and model.recovery:
            table.add_row("", "all", "", "", "", _interval(model.recovery))
    return table


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.value:.4f} ({interval.low:.4f} … {interval.high:.4f})"


def _gate(gate: Gate) -> str:
    said = f"{gate.path}: {gate.name} {gate.value:.4f}, limit {gate.limit:g}: "
    said += "passed" if gate.passed else "failed"
    return said if gate.certain else f"{said}; the error of the measurement reaches the limit"


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


def command_line() -> str:
    """The command as it was typed, for the result."""
    return shlex.join(["secateur", *sys.argv[1:]])


def _console() -> Console:
    """A console that breaks lines for a terminal only."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 250)
