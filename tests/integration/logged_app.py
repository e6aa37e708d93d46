"""The platform's app with operations that log; OWN_LOGGING replaces the logging configuration."""

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
        """Configure logging instead of Celery."""
        logging.basicConfig(level=logging.INFO, format="own|%(rlm_job)s|%(rlm_node)s|%(message)s")


@operation("log_item")
def log_item(item: int) -> int:
    """Log each item; fail at a negative one."""
    logger.info("item %d", item, extra={"squared": item**2, "not_json": object()})
    if item < 0:
        raise ValueError("it is under zero")
    return item


@operation("log_item_async", concurrency=5)
async def log_item_async(item: int) -> int:
    """Log each item, with five items in flight."""
    await asyncio.sleep(0.001)
    logger.info("item %d", item)
    return item


@operation("log_error")
def log_error(item: str) -> None:
    """Log an exception, and print two lines."""
    try:
        {}[item]
    except KeyError:
        logger.exception("not found")
    print("printed\nin two lines")


@operation("die_once_at_marker")
def die_once_at_marker(marker: str) -> None:
    """Kill the process at the first run."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
