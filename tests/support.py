"""Helpers that tests of several folders use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Return as soon as the condition holds.

    Raises AssertionError with the condition's name if it does not hold within `within_s` seconds.
    """
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"not within {within_s} s: {condition}"
        time.sleep(0.01)


def examples(n: int) -> int:
    """Return the number of random examples of a test: n, or n times the variable EXAMPLES."""
    return n * int(os.environ.get("EXAMPLES", "1"))
