"""The board of free slots in Redis: workers publish their free slots, and cuts take them.

A node that cuts takes one slot for each child, in one script.  So k free slots cause k children,
and not a cut of every running node.  Workers call `publish`; the engine and preemption call `take`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from resilience.keys import Keys
from resilience.store import Call, Script, Store

TTL_MS = 5000
"""A worker that has not published for this long has no slots."""

_PUBLISH = Script.load("scheduler", "publish")
_TAKE = Script.load("scheduler", "take")


class SlotBoard:
    """The free slots of all workers of one platform."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._key = store, keys.slots

    def publish(self, worker: str, total: int, free: int, queues: Sequence[str]) -> Call:
        """Return the call that publishes a worker's slots, in all and free, and the queues that it
        consumes.
        """
        args = (worker, total, free, json.dumps(list(queues)), TTL_MS)
        return Call(_PUBLISH, (self._key,), args, otherwise=None)

    def withdraw(self, worker: str) -> None:
        """Remove a worker from the board.  Raises StoreUnavailable."""
        self._store.call(self.publish(worker, 0, 0, ()))

    def take(self, queue: str, most: int) -> Call:
        """Return the call that takes up to `most` free slots of a queue.

        It answers [number of slots taken, number of slots that serve the queue].
        """
        return Call(_TAKE, (self._key,), (queue, most, TTL_MS), otherwise=(0, 0))
