"""Operations of the metrics tests: one with its own metric, one that ends when the test says so."""

from __future__ import annotations

import time
from pathlib import Path

from rlm_tasks import operation
from rlm_tasks.metrics.declared import Counter

LETTERS = Counter("scraped_letters_total", "Letters read.", {"script": ("latin",)})


@operation("read_letters")
def read_letters(text: str) -> int:
    """Count letters, by a declared label value for ASCII text and an undeclared one otherwise."""
    LETTERS.inc(len(text), script="latin" if text.isascii() else f"script of {text}")
    return len(text)


@operation("wait_for_file")
def wait_for_file(path: str) -> str:
    """Run until a file exists."""
    while not Path(path).exists():
        time.sleep(0.01)
    return path
