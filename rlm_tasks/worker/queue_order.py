"""The order in which a worker takes messages from Redis, under the name by which kombu finds it.

Decides where a worker's facts come from: what runs is Celery's own record, the rest is told by the
worker.  Refuses to know what follows from them."""

from __future__ import annotations

from celery.worker import state

from scheduler.stride import Facts, StrideCycle


def running(queue: str) -> int:
    """Return how many messages of a queue this worker holds, started or about to be."""
    # The bare set is copied in one step: threads of a pool take finished requests out of it at any
    # time.
    held = (reference() for reference in state.reserved_requests.data.copy())
    return sum(
        1
        for request in held
        if request is not None and request.delivery_info["routing_key"] == queue
    )


class QueueOrder(StrideCycle):
    """What kombu makes for each channel:
    ``queue_order_strategy="rlm_tasks.worker.queue_order:QueueOrder"``.

    A worker says what it knows by ``QueueOrder.facts = Facts(...)``, which holds for channels that
    exist and for those to come.  In a process that says nothing weights alone decide."""

    facts = Facts(running=running)
