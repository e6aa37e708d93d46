"""The order in which a worker takes messages from its queues in Redis, as a class for kombu.

`installation` sets it by name.  `Host` provides the facts that the order follows; the rule
is `scheduler.stride`.
"""

from __future__ import annotations

from celery.worker import state

from scheduler.stride import Facts, StrideCycle


def running(queue: str) -> int:
    """Return the number of a queue's messages that this worker holds, started or not."""
    # The underlying set is copied in one step: pool threads remove finished requests at any time.
    held = (reference() for reference in state.reserved_requests.data.copy())
    return sum(
        1
        for request in held
        if request is not None and request.delivery_info["routing_key"] == queue
    )


class QueueOrder(StrideCycle):
    """The order of one channel; kombu creates one for each.

    kombu finds it by ``queue_order_strategy="rlm_tasks.worker.queue_order:QueueOrder"``.  A worker
    sets ``QueueOrder.facts = Facts(...)``, which holds for existing and new channels.  In a process
    that sets nothing, only the weights count.
    """

    facts = Facts(running=running)
