"""Entries of queues that are no messages: the worker keeps them, with one log line each.

Such an entry comes from another program, or from a person at redis-cli.  `startup` makes the list,
`upstream` adds to it, the doctor counts it.  Begin with `DeadLetters.keep`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from resilience.store import Store
from rlm_tasks.messaging.dispatch import legible
from rlm_tasks.worker.lost_nodes import UNREACHABLE

logger = logging.getLogger(__name__)

MOST, MOST_BYTES = 100, 2_000
"""The newest entries are kept, of each its first bytes."""
LASTS_S = 30 * 86_400


class DeadLetters:
    """The dead-letter list of one platform; each new entry renews its life of 30 days."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key

    def keep(self, queue: str, entry: Any, why: str) -> None:
        """Keep an entry of a queue, with the reason why it is no message, and log one line.

        While Redis is away only the line remains.
        """
        raw = _raw(entry)
        logger.error(
            "An entry of queue %s is no message: %s. It has %d bytes, and is kept in %s",
            legible(queue),
            why,
            len(raw),
            self._key,
        )
        fields: dict[Any, Any] = {
            "queue": legible(queue),
            "why": why,
            "bytes": len(raw),
            "entry": raw[:MOST_BYTES],
        }
        try:
            self._store.call(
                lambda client: (
                    client.xadd(self._key, fields, maxlen=MOST, approximate=False),
                    client.expire(self._key, LASTS_S),
                )
            )
        except UNREACHABLE as error:
            logger.warning("The entry was not kept: %s", error)

    def count(self) -> int:
        """Return the number of entries so far, also of those that are no longer kept.

        Raises StoreUnavailable.
        """
        if not self._store.call(lambda client: client.exists(self._key)):
            return 0
        about = self._store.call(lambda client: client.xinfo_stream(self._key))
        return int(about.get("entries-added", about["length"]))


def _raw(entry: Any) -> bytes:
    """Return the bytes of an entry, which may be anything that JSON can hold."""
    if isinstance(entry, bytes):
        return entry
    if isinstance(entry, str):
        return entry.encode("utf-8", "replace")
    try:
        return json.dumps(entry, default=repr).encode()
    except (TypeError, ValueError, RecursionError):
        return f"<{type(entry).__name__}>".encode()
