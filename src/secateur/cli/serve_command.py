"""``secateur serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import app


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(help="A dense, pruned or packed model directory.")],
    engine: Annotated[str, typer.Option(help="What runs the model: auto, transformers.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SECATEUR_API_KEY",
            show_envvar=True,
            help="Key that clients must send. The variable keeps it out of process lists.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [default: all cores]")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model. [default: the directory's name]")
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint; Ctrl-C ends it.

    Example: secateur serve pruned/ --port 8000, then point any OpenAI client at
    http://127.0.0.1:8000/v1.
    """
    from secateur.serve import serve as run

    run(
        directory,
        engine=engine,
        host=host,
        port=port,
        api_key=api_key,
        threads=threads,
        served_model_name=served_model_name,
    )
