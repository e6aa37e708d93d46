"""Headless Chromium, as Debian packages it, driven by playwright.

`conftest` calls it; begin with `chromium`.  The flags stop the browser's own network requests.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

FLAGS = [
    "--no-sandbox",  # Chromium has no sandbox for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class NoChromium(Exception):
    """There is no browser on this machine."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a Chromium for the length of a block.  Raises NoChromium."""
    if (path := shutil.which("chromium")) is None:
        raise NoChromium(
            "chromium is not on PATH, and the tests of Flower's pages need it:"
            " apt-get install chromium"
        )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
