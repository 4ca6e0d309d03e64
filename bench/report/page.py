"""A report as one HTML file that asks for nothing else, or as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import secateur
from secateur.bench.report import tables
from secateur.bench.report.charts import LIGHT, Figure, draw
from secateur.bench.report.inputs import Source, embed, read_sources
from secateur.bench.report.subjects import find_subjects
from secateur.errors import UsageError

Form = Literal["html", "md"]


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: its heading.
        sources: what it was made from.
        verdicts: a sentence for each sparse model.
        figures, tables: all of them, in order.
    """

    title: str
    sources: list[Source]
    verdicts: list[str]
    figures: list[Figure]
    tables: list[tables.Table]

    def html(self) -> str:
        """The page; it has no script and loads nothing."""
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup

        environment = Environment(
            loader=PackageLoader("secateur.bench.report", "."),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html.jinja").render(
            report=self,
            figures=[(figure, Markup(figure.svg())) for figure in self.figures],
            environments=tables.environments(self.sources),
            commands=tables.commands(self.sources),
            notes=tables.notes(self.sources),
            data=Markup(embed(self.sources)),
            version=secateur.__version__,
        )

    def markdown(self, figures: str | None = None) -> str:
        """The same without the data; figures are links into the folder ``figures``."""
        parts = [f"# {self.title}"]
        if self.verdicts:
            parts.append("\n".join(f"- {sentence}" for sentence in self.verdicts))
        for figure in self.figures if figures is not None else ():
            parts.append(f"![{figure.says}]({figures}/{figure.name}.svg)")
        for table in [*self.tables, tables.environments(self.sources)]:
            parts += [f"## {table.title}", *([table.says] if table.says else []), markdown(table)]
        if said := tables.notes(self.sources):
            parts += ["## Notes", "\n".join(f"- {name}: {note}" for name, note in said)]
        if ran := tables.commands(self.sources):
            parts += ["## Commands", "\n".join(f"    {command}" for _, command in ran)]
        return "\n\n".join(parts) + "\n"

    def write_figures(self, directory: Path) -> list[Path]:
        """Write every figure as SVG and PNG, in colours for a light page."""
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for figure in self.figures:
            drawing, pixels = (directory / f"{figure.name}.{end}" for end in ("svg", "png"))
            drawing.write_text(figure.svg(LIGHT), encoding="utf-8")
            pixels.write_bytes(figure.png())
            written += [drawing, pixels]
        return written


def make_report(
    results: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    title: str | None = None,
    form: Form = "html",
    figures: str | Path | None = None,
) -> Report:
    """Make a report of results.

    Args:
        results: files of ``secateur bench … -o``, model directories (for their manifests), reports
            (for the data inside).
        output: file to write; replaced if it is there.
        title: heading; None: the models' names.
        form: html, or md.
        figures: directory for the figures as SVG and PNG; made if need be.

    Raises:
        ModelError: a file is absent or damaged.
        UsageError: a file has no place in a report, or there is nothing to tell.
    """
    sources = read_sources(results)
    subjects = find_subjects(sources)
    sparse = [subject.name for subject in subjects if subject.group == "sparse"]
    report = Report(
        title=title
        or f"Was it worth it? {', '.join(sparse[:3])}{' …' if sparse[3:] else ''}".strip(),
        sources=sources,
        verdicts=tables.verdicts(subjects),
        figures=draw(sources, subjects),
        tables=tables.tabulate(sources, subjects),
    )
    if not report.tables and not report.figures:
        raise UsageError("the results hold nothing to tell", "name at least one result file")
    if figures is not None:
        report.write_figures(Path(figures))
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = _folder(path, figures)
        text = report.html() if form == "html" else report.markdown(folder)
        path.write_text(text, encoding="utf-8")
    return report


def markdown(table: tables.Table) -> str:
    """A table as GitHub reads it."""
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [table.head, rule, *table.rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _folder(page: Path, figures: str | Path | None) -> str | None:
    """The folder of the figures as the page names it."""
    if figures is None:
        return None
    return Path(os.path.relpath(figures, page.parent)).as_posix()
