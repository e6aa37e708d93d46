"""Which worker slots are free, as a fact that workers publish and cuts take.

Decides who gets a free slot: a cut takes as many as it makes children for, in one script, so that k
free slots cause k children and not every running node cuts.  Refuses to know what will run there.
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
        """Return the call that says that a worker has `total` slots, `free` of them idle, for these
        queues.
        """
        return Call(_PUBLISH, (self._key,), (worker, total, free, json.dumps(list(queues)), TTL_MS))

    def withdraw(self, worker: str) -> None:
        """Take a worker off the board."""
        self._store.call(self.publish(worker, 0, 0, ()))

    def take(self, queue: str, most: int) -> Call:
        """Return the call that takes up to `most` free slots of a queue; it answers [taken, all
        slots].
        """
        return Call(_TAKE, (self._key,), (queue, most, TTL_MS))
