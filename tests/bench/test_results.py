"""docs/results: that its figures and numbers are made of the results that are committed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from secateur.bench.report import make_report
from tests.conftest import ROOT

RESULTS = ROOT / "docs" / "results"
FILES = ("accuracy.json", "latency.json")
RIVALS = {f"{name}.gguf" for name in ("F16", "Q8_0", "Q4_0", "Q3_K_M", "Q2_K")}


def test_the_figures_are_made_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FILES:
        shutil.copy(RESULTS / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    make_report(FILES, "report.md", title="SmolLM2-135M-Instruct", form="md", figures=".")
    made = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert {"quality-speed.svg", "quality-size.svg"} <= set(made)
    for name in [*made, "report.md"]:
        assert (RESULTS / name).read_text() == (tmp_path / name).read_text(), (
            f"run `make figures`: {name}"
        )
    readme = (ROOT / "README.md").read_text()
    for picture in re.findall(r"!\[.*?\]\((docs/results/.*?)\)", readme):
        assert (ROOT / picture).name in made


def test_the_page_has_the_numbers_of_the_results() -> None:
    """Its table: model, MB, perplexity, over dense, decode and prefill tokens per second."""
    accuracy, latency = (json.loads((RESULTS / name).read_text()) for name in FILES)
    quality = {row["path"]: row for row in accuracy["models"]}
    speed = {row["path"]: row["points"][0] for row in [latency["baseline"], *latency["models"]]}
    page = (ROOT / "docs" / "results.md").read_text()
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| [\w`]", line)
    ]
    table = {cells[0].strip("`"): cells[1:6] for cells in rows if cells[0].strip("`") in quality}
    assert set(table) == set(quality)
    assert set(quality) > RIVALS
    assert len(set(quality) - RIVALS) >= 12
    for name, cells in table.items():
        assert cells == [
            f"{quality[name]['bytes'] / 1e6:.0f}",
            f"{quality[name]['perplexity']['value']:.1f}",
            f"{quality[name]['perplexity_ratio']['value']:.2f}",
            f"{speed[name]['decode_tokens_per_s']['mean']:.0f}",
            f"{speed[name]['prefill_tokens_per_s']['mean']:.0f}",
        ], name
