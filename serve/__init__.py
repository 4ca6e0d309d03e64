"""serve: run a model behind an OpenAI-compatible endpoint.

`serve` is the command; `load` gives the engine alone. Nothing heavy is imported before they run:
transformers imports this package when it looks for secateur's quantizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.checkpoint import Checkpoint
from secateur.errors import UsageError, did_you_mean
from secateur.orphans import refuse_orphan
from secateur.serve.native import NativeOptions, load_native, native_obstacle

if TYPE_CHECKING:
    from secateur.serve.engine import Engine

__all__ = ["ENGINES", "NativeOptions", "load", "serve"]

DRAIN_SECONDS = 5.0


def _refuse(options: NativeOptions, engine: str) -> None:
    """Refuse options that another engine than the native one is given."""
    if options.given():
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in options.given())
        raise UsageError(
            f"{flags}: only the native engine has this, and the model runs on {engine}",
            "leave it out, or see what keeps the model from --engine native",
        )


def _transformers(
    directory: Path, model_name: str, threads: int | None, options: NativeOptions
) -> Engine:
    _refuse(options, "transformers")
    from secateur.serve.transformers_engine import load_transformers

    return load_transformers(directory, model_name=model_name, threads=threads)


def _onnx(
    directory: Path,
    model_name: str,
    threads: int | None,
    options: NativeOptions,
    providers: Sequence[str] = (),
) -> Engine:
    _refuse(options, "ONNX Runtime")
    from secateur.serve.onnx.engine import load_onnx

    return load_onnx(directory, model_name, threads, providers)


# Name → how a model is opened: (directory, model name, threads or None for all cores, options).
ENGINES: dict[str, Callable[[Path, str, int | None, NativeOptions], Engine]] = {
    "native": load_native,
    "onnx": _onnx,
    "transformers": _transformers,
}


def check_engine(wanted: str) -> None:
    """Refuse names that are neither in `ENGINES` nor "auto" nor "vllm".

    Raises:
        UsageError: there is no such engine.
    """
    known = [*ENGINES, "auto", "vllm"]
    if wanted not in known:
        raise UsageError(f"there is no engine {wanted!r}", did_you_mean(wanted, known))


def load(
    directory: str | Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    served_model_name: str | None = None,
    options: NativeOptions | None = None,
    providers: Sequence[str] = (),
) -> Engine:
    """Open a model directory for generation; `close` the engine after use.

    Args:
        directory: the model: dense, pruned, packed, or ONNX.
        engine: a name in `ENGINES`, or "auto"; what auto chose, and why, goes to stderr.
        threads: CPU threads; None: all cores of this process.
        served_model_name: the name in answers; None: the directory's.
        options: settings that only the native engine has.
        providers: execution providers of the ONNX engine, as ``cuda:device_id=0``; none: cpu.

    Raises:
        UsageError: there is no such engine, or it has not the options that were given.
        ModelError: the directory is not a usable model.
    """
    directory = Path(directory)
    check_engine(engine)
    if engine == "vllm":
        raise UsageError("vLLM is a server of its own", "use `secateur serve DIR --engine vllm`")
    name = served_model_name or directory.resolve().name
    if engine == "onnx" or (engine == "auto" and (directory / "model.onnx").is_file()):
        return _onnx(directory, name, threads, options or NativeOptions(), providers)
    if providers:
        raise UsageError(
            f"--provider is for ONNX Runtime, not for engine {engine}", "add --engine onnx"
        )
    refuse_orphan(Checkpoint(directory))
    if engine == "auto":
        obstacle = native_obstacle(directory)
        engine = "native" if obstacle is None else "transformers"
        reason = obstacle or "it runs this model"
        print(f"serve: engine auto: {engine} ({reason})", file=sys.stderr)
    return ENGINES[engine](directory, name, threads, options or NativeOptions())


def serve(
    directory: str | Path,
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    threads: int | None = None,
    served_model_name: str | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    options: NativeOptions | None = None,
    providers: Sequence[str] = (),
    vllm_arguments: Sequence[str] = (),
) -> None:
    """Serve a model until SIGINT or SIGTERM; once ready, says where in one line on stdout.

    Args:
        directory: the model.
        engine: see `load`; with "vllm" this process becomes vLLM's server.
        host: address to listen on.
        port: 0 takes a free one.
        api_key: if given, clients must send it.
        threads: see `load`.
        served_model_name: see `load`.
        drain_seconds: how long running requests may go on after a signal.
        options, providers: see `load`.
        vllm_arguments: further arguments of ``vllm serve``.

    Raises:
        UsageError: see `load`; or arguments for vLLM and another engine.
        EnvironmentFault: the address or port cannot be had; found before the model is opened. Or
            there is no vLLM to serve with.
        ModelError: the directory is not a usable model.
    """
    check_engine(engine)
    directory = Path(directory)
    if engine == "vllm":
        _refuse(options or NativeOptions(), "vLLM")
        from secateur.serve.vllm.launch import run as become_vllm

        become_vllm(
            directory,
            host=host,
            port=port,
            api_key=api_key,
            threads=threads,
            served_model_name=served_model_name or directory.resolve().name,
            drain_seconds=drain_seconds,
            arguments=vllm_arguments,
        )
    if vllm_arguments:
        raise UsageError(
            f"{vllm_arguments[0]} is for vLLM, not for engine {engine}", "add --engine vllm"
        )
    from secateur.serve.server import listen, run

    with listen(host, port) as listener:
        loaded = load(
            directory,
            engine=engine,
            threads=threads,
            served_model_name=served_model_name,
            options=options,
            providers=providers,
        )
        try:
            run(loaded, listener, host=host, api_key=api_key, drain_seconds=drain_seconds)
        finally:
            loaded.close()
