"""The figures: Vega-Lite through altair, drawn as SVG without a browser.

On the page colours are variables of its style sheet, so that one drawing serves light and dark; in
files (`LIGHT`) they are fixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.artifact import Manifest
from secateur.bench.latency_results import LatencyResult, Phase
from secateur.bench.report.inputs import Source
from secateur.bench.report.subjects import Subject
from secateur.bench.serving_results import ServingResult

PAGE = {"text": "var(--text)", "soft": "var(--soft)", "line": "var(--line)"} | {
    group: f"var(--{group})" for group in ("sparse", "dense", "rival")
}
LIGHT = {
    "text": "#1c1e20",
    "soft": "#5b6066",
    "line": "#d9d9d4",
    "sparse": "#1d7a3a",
    "dense": "#3a5fb0",
    "rival": "#b3541e",
}
_WIDTH, _HEIGHT = 560, 340
_FONT = "system-ui, sans-serif"
_GROUPS = ("sparse", "dense", "rival")
_NUMBERED = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows, for those who do not see it.

    Attributes:
        name: for a file.
        title, says: a heading, and one sentence.
        chart: of altair.
    """

    name: str
    title: str
    says: str
    chart: Any

    def svg(self, colours: Mapping[str, str] = PAGE) -> str:
        """The drawing, hidden from screen readers: its container has `says`."""
        import vl_convert

        drawn = vl_convert.vegalite_to_svg(_themed(self.chart, colours))
        text = re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", drawn)
        # Unique on a page, and the same each time.
        for number, found in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', text))):
            text = re.sub(rf'(id="|url\(#){found}\b', rf"\g<1>{self.name}-{number}", text)
        return text.replace("<svg ", '<svg aria-hidden="true" ', 1)

    def png(self, scale: float = 2.0) -> bytes:
        """The same as pixels, on white."""
        import vl_convert

        themed = _themed(self.chart, LIGHT) | {"background": "white"}
        drawn: bytes = vl_convert.vegalite_to_png(themed, scale=scale)
        return drawn


def draw(sources: Sequence[Source], subjects: Sequence[Subject]) -> list[Figure]:
    """All figures that the results allow."""
    made = [*_quality(subjects), *_batches(sources), *_serving(sources), *_layers(sources)]
    return [figure for figure in made if figure is not None]


def _quality(subjects: Sequence[Subject]) -> list[Figure]:
    """Perplexity against speed and against size."""
    rows: list[dict[str, Any]] = [
        {
            "name": subject.name,
            "group": subject.group,
            "perplexity": subject.quality.perplexity.value,
            "decode": subject.decode.mean if subject.decode else None,
            "megabytes": subject.bytes / 1e6,
        }
        for subject in subjects
        if subject.quality is not None
    ]
    timed = [row for row in rows if row["decode"] is not None]
    line = sorted((row for row in timed if not _beaten(row, timed)), key=lambda r: r["decode"])
    figures: list[Figure] = []
    if len(timed) > 1:
        says = (
            "Perplexity against decoded tokens per second: right and low is good. On the line: "
            + ", ".join(row["name"] for row in line)
        )
        chart = _scatter(timed, "decode", "decode, tokens/s", line)
        figures.append(Figure("quality-speed", "Quality against speed", says, chart))
    if len(rows) > 1:
        says = "Perplexity against the size of the weight files: left and low is good."
        chart = _scatter(rows, "megabytes", "weight files, MB", [])
        figures.append(Figure("quality-size", "Quality against size", says, chart))
    return figures


def _beaten(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another one is as fast and as good, and better in one of them."""
    mine = (row["decode"], -row["perplexity"])
    others = [(other["decode"], -other["perplexity"]) for other in rows]
    return any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in others)


def _scatter(
    rows: Sequence[Mapping[str, Any]], x: str, title: str, line: Sequence[Mapping[str, Any]]
) -> Any:
    import altair as alt

    across = alt.X(f"{x}:Q", title=title, scale=alt.Scale(zero=False, padding=30))
    up = alt.Y(
        "perplexity:Q", title="perplexity", scale=alt.Scale(type="log", nice=False, padding=16)
    )
    colour = alt.Color("group:N", title=None, scale=alt.Scale(domain=list(_GROUPS)))
    shape = alt.Shape("group:N", title=None, scale=alt.Scale(domain=list(_GROUPS)))
    data = _data(rows)
    points = (
        alt.Chart(data)
        .mark_point(size=70, filled=True, opacity=1)
        .encode(x=across, y=up, color=colour, shape=shape)
    )
    labels = (
        alt.Chart(data)
        .mark_text(align="left", dx=7, dy=-6, fontSize=10.5)
        .encode(x=across, y=up, text="name:N")
    )
    layers = [points, labels]
    if len(line) > 1:
        ahead = alt.Chart(_data(line)).mark_line(strokeWidth=1, strokeDash=[4, 3])
        layers.insert(0, ahead.encode(x=across, y=up))
    return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)


def _batches(sources: Sequence[Source]) -> list[Figure]:
    """Speed-up over dense against the batch, of each latency result with several."""
    figures: list[Figure] = []
    for source in sources:
        result = source.result
        if not isinstance(result, LatencyResult) or len(result.batch) < 2 or not result.baseline:
            continue
        for phase in ("prefill", "decode"):
            rows = _speedups(result, phase)
            if not rows:
                continue
            says = f"Speed-up of {phase} over {result.baseline.path} against sequences at once."
            name = f"{phase}-batch-{_word(source.name)}"
            figures.append(Figure(name, f"Speed-up of {phase} against batch", says, _curves(rows)))
    return figures


def _speedups(result: LatencyResult, phase: Phase) -> list[dict[str, Any]]:
    several = len(result.prompt) > 1
    return [
        {
            "batch": point.batch,
            "speedup": speedup.value,
            "model": model.path.rstrip("/").rpartition("/")[2]
            + (f", prompt {point.prompt}" if several else ""),
        }
        for model in result.models
        for point in model.points
        if (speedup := point.speedup(phase)) is not None
    ]


def _curves(rows: Sequence[Mapping[str, Any]]) -> Any:
    import altair as alt

    line = (
        alt.Chart(_data(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "batch:Q",
                title="sequences at once",
                scale=alt.Scale(type="log", base=2),
                axis=alt.Axis(values=sorted({row["batch"] for row in rows})),
            ),
            y=alt.Y("speedup:Q", title="x dense", scale=alt.Scale(zero=False)),
            color=alt.Color("model:N", title=None, scale=alt.Scale(scheme="tableau10")),
            strokeDash=alt.StrokeDash("model:N", title=None),
        )
    )
    one = alt.Chart(_data([{"one": 1}])).mark_rule(strokeDash=[2, 3]).encode(y="one:Q")
    return alt.layer(one, line).properties(width=_WIDTH, height=_HEIGHT * 2 // 3)


def _serving(sources: Sequence[Source]) -> list[Figure]:
    """Throughput against the time to the first token, a line for each endpoint."""
    import altair as alt

    rows = [
        {
            "model": result.model,
            "order": index,
            "load": point.load,
            "throughput": point.output_throughput,
            "ttft": point.ms("median_ttft"),
        }
        for result in (source.result for source in sources)
        if isinstance(result, ServingResult)
        for index, point in enumerate(result.points)
        if point.ms("median_ttft") is not None
    ]
    if len(rows) < 2:
        return []
    data = _data(rows)
    across = alt.X("throughput:Q", title="output tokens/s", scale=alt.Scale(zero=False, padding=30))
    up = alt.Y("ttft:Q", title="median time to first token, ms", scale=alt.Scale(type="log"))
    line = (
        alt.Chart(data)
        .mark_line(point=True)
        .encode(
            x=across,
            y=up,
            order="order:Q",
            color=alt.Color("model:N", title=None, scale=alt.Scale(scheme="tableau10")),
        )
    )
    labels = (
        alt.Chart(data)
        .mark_text(align="left", dx=7, dy=-6, fontSize=10.5)
        .encode(x=across, y=up, text="load:N")
    )
    chart = alt.layer(line, labels).properties(width=_WIDTH, height=_HEIGHT)
    says = "Median time to the first token against output tokens per second, under each load."
    return [Figure("serving", "Under load", says, chart)]


def _layers(sources: Sequence[Source]) -> list[Figure]:
    """Layer by module: sparsity and error of each model."""
    figures: list[Figure] = []
    for source in sources:
        if not isinstance(source.result, Manifest):
            continue
        model = source.name.removesuffix(".manifest.json")
        cells = []
        for name, facts in source.result.layers.items():
            if match := _NUMBERED.match(name):
                cells.append(
                    {
                        "layer": int(match[1]),
                        "module": match[2],
                        "sparsity": facts.sparsity,
                        "error": facts.relative_error,
                    }
                )
        for key, title in (("sparsity", "Sparsity"), ("error", "Error")):
            known = [cell for cell in cells if cell[key] is not None]
            if known:
                what = "share of weights removed" if key == "sparsity" else "‖(W - Ŵ)X‖² / ‖WX‖²"
                says = f"{model}: {what}, by layer and module."
                figures.append(
                    Figure(
                        f"{key}-{_word(model)}",
                        f"{title} of {model}",
                        says,
                        _heat(known, key, what),
                    )
                )
    return figures


def _heat(cells: Sequence[Mapping[str, Any]], key: str, title: str) -> Any:
    import altair as alt

    modules = list(dict.fromkeys(cell["module"] for cell in cells))
    return (
        alt.Chart(_data(cells))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("module:N", title=None, sort=modules),
            color=alt.Color(f"{key}:Q", title=title, scale=alt.Scale(scheme="viridis")),
        )
        .properties(width=_WIDTH, height=22 * len(modules))
    )


def _word(name: str) -> str:
    """Of a source, for file names and ids."""
    return re.sub(r"\W+", "-", name.removesuffix(".json"))


def _data(rows: Sequence[Mapping[str, Any]]) -> Any:
    import altair as alt

    return alt.Data(values=list(rows))


def _themed(chart: Any, colours: Mapping[str, str]) -> dict[str, Any]:
    """The chart as Vega-Lite, with its colours."""
    text = {"labelColor": colours["soft"], "titleColor": colours["text"]}
    lines = {
        "gridColor": colours["line"],
        "domainColor": colours["soft"],
        "tickColor": colours["soft"],
    }
    plain = {"labelFont": _FONT, "titleFont": _FONT, "labelFontSize": 11, "titleFontSize": 12}
    specification: dict[str, Any] = chart.to_dict()
    specification["background"] = "transparent"
    specification["config"] = {
        "axis": text | lines | plain | {"titleFontWeight": "normal"},
        "legend": text | plain | {"orient": "top", "symbolStrokeColor": colours["soft"]},
        "view": {"stroke": colours["line"]},
        "text": {"color": colours["text"], "font": _FONT},
        "rule": {"color": colours["soft"]},
        "line": {"color": colours["soft"]},
        "range": {"category": [colours[group] for group in _GROUPS]},
    }
    return specification
