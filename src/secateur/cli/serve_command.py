"""``secateur serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from secateur.cli import app

_NATIVE = "Native engine"
Directory = Annotated[Path, Argument(help="A model directory: dense, pruned, packed or ONNX.")]
Engine = Annotated[str, Option(help="What runs the model: auto, native, onnx, transformers.")]
Threads = Annotated[int | None, Option(min=1, help="CPU threads. [default: all cores]")]
MaxLength = Annotated[
    int | None,
    Option(min=1, help="Tokens of prompt and answer together.", rich_help_panel=_NATIVE),
]
CacheType = Annotated[
    str | None,
    Option(help="Type of the KV cache: fp32, fp16, int8.", rich_help_panel=_NATIVE),
]
Values = Annotated[
    str | None,
    Option(
        help="Value type of linears that are not packed: fp32, bf16, fp16, int8, int4.",
        rich_help_panel=_NATIVE,
    ),
]
HeadValues = Annotated[
    str | None,
    Option(
        help="Value type of the output layer: auto, fp32, bf16, fp16, int8, int4.",
        rich_help_panel=_NATIVE,
    ),
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: Context,
    directory: Directory,
    engine: Annotated[
        str, Option(help="What runs the model: auto, native, onnx, transformers, vllm.")
    ] = "auto",
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        Option(
            envvar="SECATEUR_API_KEY",
            show_envvar=True,
            help="Key that clients must send. The variable keeps it out of process lists.",
        ),
    ] = None,
    threads: Threads = None,
    served_model_name: Annotated[
        str | None, Option(help="Name of the model. [default: the directory's name]")
    ] = None,
    drain_seconds: Annotated[
        float, Option(min=0, help="Time that running requests get to finish after a signal.")
    ] = 5.0,
    provider: Annotated[
        list[str] | None,
        Option(
            help="ONNX Runtime's execution provider, with options: cuda:device_id=0. May be "
            "repeated; cpu comes last.",
        ),
    ] = None,
    kv_cache_type: CacheType = None,
    kv_cache_memory: Annotated[
        str | None, Option(help="Size of the KV cache, e.g. 2GiB.", rich_help_panel=_NATIVE)
    ] = None,
    values: Values = None,
    head_values: HeadValues = None,
    max_length: MaxLength = None,
    max_running: Annotated[
        int | None, Option(min=1, help="Sequences computed at once.", rich_help_panel=_NATIVE)
    ] = None,
    max_waiting: Annotated[
        int | None,
        Option(min=0, help="Requests that may wait; more get a 429.", rich_help_panel=_NATIVE),
    ] = None,
    token_budget: Annotated[
        int | None, Option(min=1, help="Prompt tokens read per step.", rich_help_panel=_NATIVE)
    ] = None,
    deadline: Annotated[
        float | None,
        Option(min=0, help="Seconds that a request may take at most.", rich_help_panel=_NATIVE),
    ] = None,
    cache_weights: Annotated[
        bool,
        Option(
            "--cache-weights",
            help="Keep the packed weights in a file: later starts pack nothing, and processes "
            "share one copy.",
            rich_help_panel=_NATIVE,
        ),
    ] = False,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint, with a page at /; Ctrl-C ends it.

    The options from --kv-cache-type on are those of the native engine; the others refuse them.

    With --engine vllm all other options go to `vllm serve`, e.g. --max-model-len 4096.

    Example: secateur serve pruned/ --port 8000, then open http://127.0.0.1:8000/ or point any
    OpenAI client at http://127.0.0.1:8000/v1.
    """
    from secateur.errors import UsageError, did_you_mean
    from secateur.serve import NativeOptions
    from secateur.serve import serve as run
    from secateur.sizes import parse_size

    if context.args and engine != "vllm":
        given, options = context.args[0], (one.opts[0] for one in context.command.params)
        known = [name for name in options if name.startswith("--")]
        raise UsageError(f"there is no option {given!r}", did_you_mean(given, known))
    run(
        directory,
        engine=engine,
        host=host,
        port=port,
        api_key=api_key,
        threads=threads,
        served_model_name=served_model_name,
        drain_seconds=drain_seconds,
        options=NativeOptions(
            kv_cache_type=kv_cache_type,
            kv_cache_memory=None if kv_cache_memory is None else parse_size(kv_cache_memory),
            values=values,
            head_values=head_values,
            max_length=max_length,
            max_running=max_running,
            max_waiting=max_waiting,
            token_budget=token_budget,
            deadline=deadline,
            cache_weights=cache_weights or None,
        ),
        providers=provider or (),
        vllm_arguments=context.args,
    )
