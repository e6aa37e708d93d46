"""The platform's app, with operations that log; with OWN_LOGGING it brings its own configuration of
logging.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

from celery import signals

from rlm_tasks import operation
from rlm_tasks.celery import app as app

logger = logging.getLogger(__name__)

if os.environ.get("OWN_LOGGING"):

    @signals.setup_logging.connect
    def configure(**_: Any) -> None:
        """Take the place of Celery's configuration."""
        logging.basicConfig(level=logging.INFO, format="own|%(rlm_job)s|%(rlm_node)s|%(message)s")


@operation("tell")
def tell(item: int) -> int:
    """Log each item, and fail at those under zero."""
    logger.info("item %d", item, extra={"squared": item**2, "unheard": object()})
    if item < 0:
        raise ValueError("it is under zero")
    return item


@operation("tell_in_flight", concurrency=5)
async def tell_in_flight(item: int) -> int:
    """Log each item, with five in flight."""
    await asyncio.sleep(0.001)
    logger.info("item %d", item)
    return item


@operation("tell_of_an_error")
def tell_of_an_error(item: str) -> None:
    """Log an exception, and print."""
    try:
        {}[item]
    except KeyError:
        logger.exception("not found")
    print("printed\nin two lines")


@operation("die_once_and_tell")
def die_once_and_tell(marker: str) -> None:
    """Kill the process the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
