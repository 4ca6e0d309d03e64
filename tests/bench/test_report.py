"""Reports: which model beats which, what is said of it, and the data that comes out again."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.bench.report import extract, make_report
from secateur.bench.report.inputs import Source, embed, read_sources
from secateur.bench.report.subjects import Subject, find_subjects, front
from secateur.errors import ModelError, UsageError
from tests.bench.reporting import accuracy, latency, quality, spread, write_all


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 4)] * 3), max_size=8))
def test_the_front_is_what_no_other_beats(merits: list[tuple[int, int, int]]) -> None:
    """By the definition, pair by pair."""
    subjects = [
        Subject(
            path=str(i),
            name=str(i),
            group="sparse",
            engine="native",
            bytes=size,
            quality=quality(str(i), size, float(perplexity), None),
            baseline=None,
            decode=spread(float(speed)),
        )
        for i, (perplexity, speed, size) in enumerate(merits)
    ]
    expected = []
    for i, (perplexity, speed, size) in enumerate(merits):
        beaten = False
        for other in merits:
            as_good = other[0] <= perplexity and other[1] >= speed and other[2] <= size
            beaten |= as_good and other != (perplexity, speed, size)
        if not beaten:
            expected.append(str(i))
    assert [subject.name for subject in front(subjects)] == expected


def test_models_are_joined_by_path_and_told_apart(tmp_path: Path) -> None:
    subjects = {one.name: one for one in find_subjects(read_sources(write_all(tmp_path)))}
    assert set(subjects) == {"dense", "sparse", "Q4.gguf", "dense (vllm)"}
    assert {name: one.group for name, one in subjects.items()} == {
        "dense": "dense",
        "sparse": "sparse",
        "Q4.gguf": "rival",
        "dense (vllm)": "rival",
    }
    sparse = subjects["sparse"]
    assert sparse.quality is not None
    assert sparse.decode is not None
    assert (sparse.quality.perplexity.value, sparse.decode.mean) == (12.0, 8.0)
    assert subjects["dense (vllm)"].quality == subjects["dense"].quality  # the same weights
    assert subjects["dense (vllm)"].decode != subjects["dense"].decode


def test_names_are_as_long_as_they_must_be() -> None:
    sizes = {"a/x/packed": (1, 2.0), "a/y/packed": (1, 2.0), "b/dense": (2, 1.0)}
    source = Source("a.json", {}, accuracy(sizes, "b/dense"))
    names = {one.path: one.name for one in find_subjects([source])}
    assert names == {"a/x/packed": "x/packed", "a/y/packed": "y/packed", "b/dense": "dense"}


def test_the_verdict_names_what_beats_the_model(tmp_path: Path) -> None:
    report = make_report(write_all(tmp_path))
    (sentence,) = report.verdicts
    assert sentence.startswith(
        "sparse: 0.50 of the dense model's bytes; decodes 2.00 ± 0.050 times"
    )
    assert "perplexity times 1.20" in sentence
    assert sentence.endswith("beaten in speed, size and perplexity at once by Q4.gguf.")


class _Tags(HTMLParser):
    """Every address in a page, and the heading structure."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")
        ]


def test_the_page_asks_for_nothing_and_gives_its_data_back(tmp_path: Path) -> None:
    results = write_all(tmp_path)
    page = tmp_path / "out/report.html"
    make_report(results, page)
    text = page.read_text()
    parser = _Tags()
    parser.feed(text)
    outside = [at for at in parser.addresses if not at.startswith(("#", "data:"))]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert parser.tags.count("script") == 1  # the data, which does not run
    assert parser.tags.count("h1") == 1
    assert "a note &lt;b&gt;" in text

    written = extract(page, tmp_path / "again")
    assert [file.name for file in written] == [
        "accuracy.json",
        "latency.json",
        "rivals.json",
        "sparse.manifest.json",
    ]
    for file, result in zip(written, results, strict=True):
        source = Path(result)
        source = source / "manifest.json" if source.is_dir() else source
        assert json.loads(file.read_text()) == json.loads(source.read_text())
    assert make_report([page], tmp_path / "b.html").html() == text  # a report of a report
    with pytest.raises(UsageError, match="is there already"):
        extract(page, tmp_path / "again")


@settings(max_examples=30, deadline=None)
@given(st.text() | st.sampled_from(["</script>", "<!--", "]]>", "\u2028", "</SCRIPT >"]))
def test_any_text_survives_inside_a_page(text: str) -> None:
    content: dict[str, Any] = {"schema": "x", "text": text}
    element = embed([Source("a.json", content, None)])
    assert "</" not in element.removesuffix("</script>")
    inside = element.partition(">")[2].removesuffix("</script>")
    assert json.loads(inside)["sources"][0]["content"] == content


def test_figures_are_drawings_without_outside_parts(tmp_path: Path) -> None:
    report = make_report(write_all(tmp_path), tmp_path / "r.md", form="md", figures=tmp_path / "f")
    names = [figure.name for figure in report.figures]
    assert names[:2] == ["quality-speed", "quality-size"]
    assert {"sparsity-sparse", "error-sparse", "decode-batch-latency"} <= set(names)
    for name in names:
        drawing = (tmp_path / f"f/{name}.svg").read_text()
        ElementTree.fromstring(drawing)
        assert "var(" not in drawing
        assert (tmp_path / f"f/{name}.png").read_bytes().startswith(b"\x89PNG")
    ids = re.findall(r'id="([^"]+)"', "".join(figure.svg() for figure in report.figures))
    assert len(ids) == len(set(ids)) > 0
    text = (tmp_path / "r.md").read_text()
    assert f"]({'f'}/quality-speed.svg)" in text
    assert "| sparse | native |" in text
    assert "- accuracy.json: a note <b>" in text


def test_the_speed_up_against_batch_is_that_of_the_result() -> None:
    from secateur.bench.report.charts import draw

    result = latency({"d": {1: 4.0, 8: 5.0}, "s": {1: 8.0, 8: 4.5}}, "d", "native")
    figures = {figure.name: figure for figure in draw([Source("l", {}, result)], [])}
    rows = figures["decode-batch-l"].chart.to_dict()["layer"][1]["data"]["values"]
    found = {(row["model"], row["batch"]): row["speedup"] for row in rows}
    assert found == {("s", 1): 2.0, ("s", 8): 0.9}


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": "secateur/bench-latency/1"}')
    with pytest.raises(UsageError, match="bench-latency/1"):
        read_sources([tmp_path / "other.json"])
    (tmp_path / "half.json").write_text('{"schema": "secateur/bench-accuracy/2"}')
    with pytest.raises(UsageError, match="not as its schema says"):
        read_sources([tmp_path / "half.json"])
    (tmp_path / "no.json").write_text("no")
    with pytest.raises(ModelError, match="no JSON"):
        read_sources([tmp_path / "no.json"])
    (tmp_path / "page.html").write_text("<html></html>")
    with pytest.raises(ModelError, match="no report"):
        read_sources([tmp_path / "page.html"])
    with pytest.raises(ModelError, match="cannot be read"):
        read_sources([tmp_path / "absent.json"])
    with pytest.raises(UsageError, match="nothing to tell"):
        make_report([])


def test_the_command(tmp_path: Path, secateur_command: Any) -> None:
    results, page = write_all(tmp_path), tmp_path / "r.html"
    said = json.loads(secateur_command("report", *results, "-o", str(page), "--json").stdout)
    assert said["verdicts"][0].startswith("sparse: ")
    names = secateur_command("report", str(page), "--extract", str(tmp_path / "x")).stdout.split()
    assert Path(names[0]).name == "accuracy.json"
    ran = secateur_command("report", *results)
    assert ran.returncode == 2
    assert "-o report.html" in ran.stderr
