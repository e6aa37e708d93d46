"""Debian's Chromium without a screen, driven by playwright.

Decides which browser is used and what it must leave alone: a test machine's browser calls nobody.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

FLAGS = [
    "--no-sandbox",  # root may not have one
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
            "Flower's pages are looked at in Chromium, which is not on PATH: apt-get install chromium"
        )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
