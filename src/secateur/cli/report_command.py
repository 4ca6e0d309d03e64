"""``secateur report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, app, emit
from secateur.errors import UsageError, did_you_mean


@app.command()
def report(
    results: Annotated[
        list[str],
        Argument(help="Result files of `bench … -o`, model directories, or reports."),
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", help="File to write; replaced if it is there.")
    ] = None,
    format: Annotated[
        str | None,
        Option(help="html or md.", show_default="by the name of the file"),
    ] = None,
    title: Annotated[str | None, Option(help="Heading.", show_default="the models' names")] = None,
    figures: Annotated[
        Path | None, Option(help="Also write the figures here, as SVG and PNG.")
    ] = None,
    extract: Annotated[
        Path | None, Option(help="Instead write the data inside one report into this directory.")
    ] = None,
    json: Json = False,
) -> None:
    """Make one page of results, with the data inside; it opens without a network.

    Example: secateur report accuracy.json latency.json packed/ -o report.html
    """
    from secateur.bench import report as reports

    if extract is not None:
        if len(results) != 1 or output is not None:
            raise UsageError("--extract takes one report, and no -o", "name the report alone")
        written = [str(path) for path in reports.extract(results[0], extract)]
        _say({"files": written}, "\n".join(written), json)
        return
    if output is None and figures is None:
        raise UsageError("there is nowhere to write to", "add -o report.html, or --figures DIR")
    suffix = output.suffix.removeprefix(".") if output is not None else "html"
    form = format or ("md" if suffix == "md" else "html")
    if form not in ("html", "md"):
        raise UsageError(f"there is no format {form!r}", did_you_mean(form, ["html", "md"]))
    made = reports.make_report(
        results,
        output,
        title=title,
        form=form,  # type: ignore[arg-type]
        figures=figures,
    )
    said = [*made.verdicts, f"written to {output}" if output else f"figures in {figures}"]
    facts = {"output": str(output) if output else None, "verdicts": made.verdicts}
    _say(facts, "\n".join(said), json)


def _say(facts: dict[str, Any], text: str, json: bool) -> None:
    if json:
        emit(facts)
    else:
        print(text)
