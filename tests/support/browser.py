"""Helper that opens web pages in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

expect.set_options(timeout=60_000)  # milliseconds; the default of 5 s is too short on a busy machine


@contextmanager
def open_page(address: str) -> Iterator[Page]:
    """Open an address in headless Chromium.

    When the block ends, check that the browser's console is empty and that all requests went to the opened address.
    """
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        console: list[str] = []
        requested: list[str] = []
        tab.on("console", lambda message: console.append(message.text))
        tab.on("pageerror", lambda error: console.append(str(error)))
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto(address)
        yield tab
        browser.close()
    assert console == []
    assert all(url.startswith((address.partition("#")[0], "data:")) for url in requested), requested
