"""The event loop of one process."""

from __future__ import annotations

import asyncio
import os

_runners: dict[int, asyncio.Runner] = {}


def event_loop() -> asyncio.Runner:
    """Return this process's event loop; it outlives nodes, so that users may keep connections
    open.
    """
    if os.getpid() not in _runners:
        _runners.clear()
        _runners[os.getpid()] = asyncio.Runner()
    return _runners[os.getpid()]
