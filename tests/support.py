"""Small things that tests of several folders use."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Return when the condition holds; fail, naming it, when it does not in time."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"not within {within_s} s: {condition}"
        time.sleep(0.01)
