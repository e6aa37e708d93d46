"""Quarantined items: items that killed their processes, and are not run again.

Each job keeps its own, and one index lists the jobs that have any.  The engine writes the index,
clients read and empty it.  Begin with `Quarantine.items`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from resilience.keys import Keys
from resilience.store import OnOutage, Store
from resilience.validation import readable
from rlm_tasks.results import QuarantinedItem

QUARANTINE_TTL_S = 30 * 86_400


_DECODER = msgspec.json.Decoder(QuarantinedItem)


class Quarantine:
    """The quarantined items of a platform's jobs.  Each method raises StoreUnavailable."""

    def __init__(self, store: Store, keys: Keys, *, on_outage: OnOutage = "raise") -> None:
        self._store, self._keys = store, keys
        self._on_outage: OnOutage = on_outage

    def jobs(self) -> list[str]:
        """Return the jobs that have, or had, quarantined items, the newest first."""
        found: Any = self._call(lambda client: client.zrange(self._keys.quarantined, 0, -1))
        return readable("a job with quarantined items", found[::-1], bytes.decode)

    def items(self, job: str) -> list[QuarantinedItem]:
        """Return a job's quarantined items, in order."""
        found: Any = self._call(lambda client: client.hvals(self._keys.of(job).quarantine))
        items = readable(f"a quarantined item of job {job}", found, _DECODER.decode)
        return sorted(items, key=lambda item: item.index)

    def list_job(self, job: str) -> None:
        """List a job that is about to have quarantined items; readers skip a job without any."""
        self._call(lambda client: self._list(client, job))

    def _list(self, client: Any, job: str) -> None:
        key, now_ms = self._keys.quarantined, self._store.now_ms()
        pipe = client.pipeline(transaction=False)
        pipe.zadd(key, {job: now_ms})
        pipe.zremrangebyscore(key, "-inf", now_ms - QUARANTINE_TTL_S * 1000)
        pipe.expire(key, QUARANTINE_TTL_S)
        pipe.execute()

    def drop(self, job: str, indexes: Sequence[int]) -> None:
        """Delete quarantined items; a job without any leaves the list of such jobs."""
        fields = list(map(str, indexes))
        self._call(lambda client: client.hdel(self._keys.of(job).quarantine, *fields))
        if not self.items(job):
            self._call(lambda client: client.zrem(self._keys.quarantined, job))

    def _call(self, command: Any) -> Any:
        return self._store.call(command, on_outage=self._on_outage)
