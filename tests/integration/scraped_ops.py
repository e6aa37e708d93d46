"""Operations whose workers are scraped: with a metric of their own, and with an end that a test
decides.
"""

from __future__ import annotations

import time
from pathlib import Path

from rlm_tasks import operation
from rlm_tasks.metrics.declared import Counter

LETTERS = Counter("scraped_letters_total", "Letters read.", {"script": ("latin",)})


@operation("read_letters")
def read_letters(text: str) -> int:
    """Count letters, of the one script that was declared and of others."""
    LETTERS.inc(len(text), script="latin" if text.isascii() else f"script of {text}")
    return len(text)


@operation("wait_for_file")
def wait_for_file(path: str) -> str:
    """Run until a file is there."""
    while not Path(path).exists():
        time.sleep(0.01)
    return path
