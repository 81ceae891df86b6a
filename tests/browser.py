"""A real browser for tests, and a page that remembers what should never happen on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; without one the tests skip and say so, but in continuous integration they fail."""
    known = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next((one for one in known if one), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        message = "NO BROWSER: the report was not tested in one; install chromium and playwright"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page that remembers all that should never happen on it."""

    def __init__(self, browser: Any, home: str = "file://", **options: Any) -> None:
        self.home = home
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("requestfailed", self._failed)
        self.context.route("**/*", self._route)

    def _dialog(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # leaving a page stops what it was still loading
            self.wrong.append(f"failed: {request.url} {request.failure}")

    def _route(self, route: Any) -> None:
        url = route.request.url
        self.requests.append(url)
        if url.startswith(("file://", "data:", "blob:", self.home)):
            route.continue_()
        else:
            self.wrong.append(f"network: {url}")
            route.abort()

    def open(self, path: Path, anchor: str = "") -> Any:
        self.page.goto(path.as_uri() + anchor)
        return self.page


@pytest.fixture
def watched(chromium: Any) -> Iterator[Watched]:
    made = Watched(chromium)
    yield made
    made.context.close()
    assert made.wrong == []


# How much of the map of the network is faded, 0 to 1.
VEILED = """() => {
  const one = document.querySelector(".network canvas");
  const copy = Object.assign(document.createElement("canvas"), { width: one.width, height: one.height });
  const paint = copy.getContext("2d", { willReadFrequently: true });
  paint.drawImage(one, 0, 0);
  const dots = paint.getImageData(0, 0, one.width, one.height).data;
  let covered = 0;
  for (let at = 3; at < dots.length; at += 4) covered += dots[at] > 127;
  return covered / (one.width * one.height);
}"""
