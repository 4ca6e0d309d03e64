"""The page at / in a real browser; run by `make test-page`, which needs Chromium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Server, start_server

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Chromium is missing; `make test-page` installs it"
    with sync_playwright() as playwright:
        # root, as in a container, may not use Chromium's own sandbox
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def guarded(slow: Path) -> Iterator[Server]:
    running = start_server(slow, "--engine", "native", "--api-key", "sesame")
    yield running
    running.stop()


@pytest.fixture
def page(browser: Any, guarded: Server) -> Iterator[Any]:
    """The page, opened; it must not have logged an error when the test ends."""
    opened = browser.new_page(color_scheme="dark")
    faults: list[str] = []
    opened.on("pageerror", lambda fault: faults.append(str(fault)))
    opened.goto(guarded.url)
    yield opened
    opened.close()
    assert not faults


def unlock(page: Any) -> None:
    page.get_by_label("API key").fill("sesame")
    page.get_by_label("API key").press("Tab")
    page.locator("#engine", has_text="native").wait_for()


def send(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_a_conversation(page: Any, guarded: Server) -> None:
    page.locator("#trouble", has_text="API key").wait_for()
    unlock(page)
    page.get_by_label("Most tokens").fill("6")
    page.get_by_label("Temperature").fill("0")
    sent = []
    page.on("request", lambda request: sent.append((request.url, request.post_data)))
    for turn, text in enumerate(("hi <b>there</b>", "and now?"), 1):
        send(page, text)
        note = page.locator(".assistant .note", has_text="tokens/s").nth(turn - 1)
        note.wait_for()
        page.locator("#send:enabled").wait_for()
        assert "first token" in note.inner_text()
        assert page.locator(".user").nth(turn - 1).inner_text() == text  # text, not markup
    chats = [body for url, body in sent if url.endswith("/v1/chat/completions")]
    assert len(chats) == 2
    assert all(word in chats[1] for word in ("hi <b>there</b>", "and now?", "assistant"))
    assert all(url.startswith(guarded.url) for url, _ in sent)
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0


def test_stop(page: Any, guarded: Server) -> None:
    unlock(page)
    page.get_by_label("Most tokens").fill("3000")
    page.evaluate(
        """() => {
          const real = window.fetch;  // the model may end by itself: keep it from doing so
          window.fetch = (url, options) => real(url, options?.body
            ? { ...options, body: options.body.replace("{", `{"ignore_eos":true,`) }
            : options);
        }"""
    )
    send(page, "go on and on")
    page.locator(".assistant .note", has_text="tokens/s").wait_for()
    assert guarded.metric("num_requests_running") == 1
    page.get_by_role("button", name="Stop").click()
    page.locator(".assistant .note", has_text="stopped").wait_for()
    until = time.monotonic() + 10  # the page counts every other second, and may show a 0 of before
    while guarded.metric("num_requests_running") and time.monotonic() < until:
        time.sleep(0.05)
    assert guarded.metric("num_requests_running") == 0
    page.locator("#running", has_text="0").wait_for()


def test_faults_are_shown(page: Any) -> None:
    send(page, "without a key")
    page.locator(".fault", has_text="API key").last.wait_for()
    unlock(page)
    page.get_by_label("Most tokens").fill("99999")
    send(page, "too much")
    page.locator(".fault", has_text="maximum context length").wait_for()


def test_the_status_says_what_computes_what(page: Any) -> None:
    unlock(page)
    assert page.locator("#model").inner_text() == "slow-llama"
    assert "up to 4096 tokens" in page.locator("#description").inner_text()
    assert page.locator("#layers li").count() >= 1
    assert "of" in page.locator("#cache").inner_text()


def test_it_can_be_used_without_a_mouse_and_on_a_phone(page: Any) -> None:
    unlock(page)
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
    assert {"prompt", "send", "temperature", "most", "key"} <= set(names)
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button')]
           .filter((one) => !one.labels?.length && !one.textContent.trim()).length"""
    )
    assert unnamed == 0
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
