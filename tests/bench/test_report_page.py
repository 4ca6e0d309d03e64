"""A report in a real browser, in both colour schemes; run by `make test-page`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from secateur.bench.report import make_report
from tests.bench.reporting import write_all

pytestmark = pytest.mark.page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_is_readable_for_everyone(tmp_path: Path, scheme: Any) -> None:
    from axe_core_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    make_report(write_all(tmp_path), tmp_path / "report.html")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Chromium is missing; `make test-page` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme)
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        address = (tmp_path / "report.html").as_uri()
        page.goto(address)
        assert [url for url in asked if not url.startswith("data:")] == [address]
        assert said == []
        found = Axe().run(page)
        assert found["passes"]
        assert [(fault["id"], fault["nodes"]) for fault in found["violations"]] == []
        # The drawings take the colours of the scheme.
        colour = page.evaluate(
            "getComputedStyle([...document.querySelectorAll('figure svg text')]"
            ".find(text => text.textContent === 'sparse')).fill"
        )
        dark = int(colour.removeprefix("rgb(").split(",")[0]) < 128
        assert dark == (scheme == "light")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#figures"
        browser.close()
