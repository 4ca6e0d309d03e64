"""serve: run a model behind an OpenAI-compatible endpoint.

`serve` is the command; `load` gives the engine alone. Nothing heavy is imported before they run:
transformers imports this package when it looks for secateur's quantizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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


def _transformers(
    directory: Path, model_name: str, threads: int | None, options: NativeOptions
) -> Engine:
    if options.given():
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in options.given())
        raise UsageError(
            f"{flags}: only the native engine has this, and {directory} runs on transformers",
            "leave it out, or see what keeps the model from --engine native",
        )
    from secateur.serve.transformers_engine import load_transformers

    return load_transformers(directory, model_name=model_name, threads=threads)


# Name → how a model is opened: (directory, model name, threads or None for all cores, options).
ENGINES: dict[str, Callable[[Path, str, int | None, NativeOptions], Engine]] = {
    "native": load_native,
    "transformers": _transformers,
}


def check_engine(wanted: str) -> None:
    """Refuse names that are neither in `ENGINES` nor "auto".

    Raises:
        UsageError: there is no such engine.
    """
    if wanted not in (*ENGINES, "auto"):
        raise UsageError(f"there is no engine {wanted!r}", did_you_mean(wanted, [*ENGINES, "auto"]))


def load(
    directory: str | Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    served_model_name: str | None = None,
    options: NativeOptions | None = None,
) -> Engine:
    """Open a dense, pruned or packed model directory for generation; `close` the engine after use.

    Args:
        directory: the model.
        engine: a name in `ENGINES`, or "auto"; what auto chose, and why, goes to stderr.
        threads: CPU threads; None: all cores of this process.
        served_model_name: the name in answers; None: the directory's.
        options: settings that only the native engine has.

    Raises:
        UsageError: there is no such engine, or it has not the options that were given.
        ModelError: the directory is not a usable model.
    """
    directory = Path(directory)
    check_engine(engine)
    refuse_orphan(Checkpoint(directory))
    if engine == "auto":
        obstacle = native_obstacle(directory)
        engine = "native" if obstacle is None else "transformers"
        reason = obstacle or "it runs this model"
        print(f"serve: engine auto: {engine} ({reason})", file=sys.stderr)
    name = served_model_name or directory.resolve().name
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
) -> None:
    """Serve a model until SIGINT or SIGTERM; once ready, says where in one line on stdout.

    Args:
        directory: the model.
        engine: see `load`.
        host: address to listen on.
        port: 0 takes a free one.
        api_key: if given, clients must send it.
        threads: see `load`.
        served_model_name: see `load`.
        drain_seconds: how long running requests may go on after a signal.
        options: see `load`.

    Raises:
        UsageError: see `load`.
        EnvironmentFault: the address or port cannot be had; found before the model is opened.
        ModelError: the directory is not a usable model.
    """
    check_engine(engine)
    from secateur.serve.server import listen, run

    with listen(host, port) as listener:
        loaded = load(
            directory,
            engine=engine,
            threads=threads,
            served_model_name=served_model_name,
            options=options,
        )
        try:
            run(loaded, listener, host=host, api_key=api_key, drain_seconds=drain_seconds)
        finally:
            loaded.close()
