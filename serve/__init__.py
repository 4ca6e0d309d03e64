"""serve: run a model behind an OpenAI-compatible endpoint.

`serve` is the command; `load` gives the engine alone. Nothing heavy is imported before they run:
transformers imports this package when it looks for secateur's quantizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from secateur.serve.engine import Engine

__all__ = ["ENGINES", "load", "serve"]


def _transformers(directory: Path, model_name: str, threads: int | None) -> Engine:
    from secateur.serve.transformers_engine import load_transformers

    return load_transformers(directory, model_name=model_name, threads=threads)


# Name → how a model is opened: (directory, model name, threads or None for all cores) → engine.
ENGINES: dict[str, Callable[[Path, str, int | None], Engine]] = {"transformers": _transformers}


def choose_engine(wanted: str) -> tuple[str, str]:
    """The engine to use, and why.

    Args:
        wanted: a name in `ENGINES`, or "auto".

    Raises:
        UsageError: there is no such engine.
    """
    if wanted == "auto":
        return "transformers", "it is the only engine so far, and opens every model"
    if wanted not in ENGINES:
        raise UsageError(f"there is no engine {wanted!r}", did_you_mean(wanted, [*ENGINES, "auto"]))
    return wanted, "as asked"


def load(
    directory: str | Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    served_model_name: str | None = None,
) -> Engine:
    """Open a dense, pruned or packed model directory for generation; `close` the engine after use.

    Args:
        directory: the model.
        engine: a name in `ENGINES`, or "auto"; what auto chose goes to stderr.
        threads: CPU threads; None: all cores of this process.
        served_model_name: the name in answers; None: the directory's.

    Raises:
        UsageError: there is no such engine.
        ModelError: the directory is not a usable model.
    """
    directory = Path(directory)
    name, reason = choose_engine(engine)
    if engine == "auto":
        print(f"serve: engine auto: {name} ({reason})", file=sys.stderr)
    return ENGINES[name](directory, served_model_name or directory.resolve().name, threads)


def serve(
    directory: str | Path,
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    threads: int | None = None,
    served_model_name: str | None = None,
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

    Raises:
        UsageError: there is no such engine.
        EnvironmentFault: the address or port cannot be had; found before the model is opened.
        ModelError: the directory is not a usable model.
    """
    choose_engine(engine)
    from secateur.serve.server import listen, run

    with listen(host, port) as listener:
        loaded = load(
            directory, engine=engine, threads=threads, served_model_name=served_model_name
        )
        try:
            run(loaded, listener, host=host, api_key=api_key)
        finally:
            loaded.close()
