"""The platform's app with queues in their order, a worker's facts for it, and an operation that notes when it begins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from celery import signals

from rlm_tasks import Context, operation
from rlm_tasks.celery import app as app
from rlm_tasks.queue_order import QueueOrder, running
from scheduler.cycle import Facts
from tests.integration.conftest import SLOTS

ITEM_S = 0.01

app.conf.broker_transport_options["queue_order_strategy"] = "rlm_tasks.queue_order:QueueOrder"


@signals.worker_init.connect
def _know_the_slots(**_: Any) -> None:
    QueueOrder.facts = Facts(running=running, slots=lambda: SLOTS)


@operation("take_turns")
def take_turns(item: str, ctx: Context) -> None:
    """Note that an item has begun, and hold the slot for a while."""
    note(Path(ctx.params["journal"]), item)
    time.sleep(ITEM_S)


def note(journal: Path, word: Any) -> None:
    """Append a line; one this short is appended whole, whoever writes beside."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(f"{word}\n")
