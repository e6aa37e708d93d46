"""The order of a worker's queues, and the facts that it takes into account."""

from __future__ import annotations

import pytest
from celery.worker import state
from kombu.utils.scheduling import cycle_by_name

from rlm_tasks.worker import queue_order
from rlm_tasks.worker.queue_order import QueueOrder
from scheduler.stride import Facts

NAMES = ["unit.critical", "unit.high", "unit.normal", "unit.low"]


class Held:
    """The part of a request that is counted."""

    def __init__(self, queue: str | None) -> None:
        self.delivery_info = {"routing_key": queue}


def test_running_nodes_are_counted_by_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [Held("unit.critical"), Held("unit.low"), Held("unit.critical"), Held(None)]
    monkeypatch.setattr(state, "reserved_requests", type(state.reserved_requests)(held))

    assert [queue_order.running(name) for name in ("unit.critical", "unit.low", "unit.high")] == [
        2,
        1,
        0,
    ]
    del held[0]
    assert queue_order.running("unit.critical") == 1, "a request that is no longer held has ended"


def test_without_facts_weights_alone_order_the_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueueOrder, "facts", Facts())
    order = cycle_by_name("rlm_tasks.worker.queue_order:QueueOrder")()
    order.update(NAMES[::-1])
    order.consume(4)
    order.rotate("unit.critical")
    order.rotate("unit.critical")

    assert order.consume(4) == ["unit.high", "unit.critical", "unit.normal", "unit.low"]


def test_facts_hold_for_a_channel_that_is_older_than_the_facts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = QueueOrder()
    order.update(NAMES)
    order.consume(4)
    order.rotate("unit.critical")

    monkeypatch.setattr(QueueOrder, "facts", Facts(running=queue_order.running, slots=lambda: 2))

    assert order.consume(4) == NAMES
