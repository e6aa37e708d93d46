"""The list of all jobs that Redis still knows, open or ended, by the time of their opening.

`Ledger.open` adds jobs, clients read the newest, and workers remove the jobs that have expired.
Begin with `JobList.newest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resilience.keys import Keys
from resilience.store import OnOutage, Store
from resilience.validation import readable

TRIM_AT_ONCE = 500
"""About this many entries are looked at in one call of `trim`."""
OPENING_MS = 60_000
"""A job is listed before its keys are written, so it counts as expired only after this time."""


class JobList:
    """The jobs of one platform.  The list never expires: it belongs to the jobs of all clients."""

    def __init__(self, store: Store, keys: Keys, *, on_outage: OnOutage = "raise") -> None:
        self._store, self._keys = store, keys
        self._on_outage: OnOutage = on_outage
        self._cursor = 0

    def add(self, pipe: Any, opened_ms: Mapping[str, int]) -> None:
        """Add new jobs to a pipeline, by the ms at which they were opened."""
        if opened_ms:
            pipe.zadd(self._keys.jobs, dict(opened_ms), nx=True)
            pipe.persist(self._keys.jobs)

    def newest(self, limit: int) -> list[tuple[str, int]]:
        """Return (job, ms opened), the newest first.  Raises StoreUnavailable."""
        found: list[tuple[str, int]] = []
        at = 0
        while len(found) < limit:
            first, last = at, at + limit - len(found) - 1
            page: Any = self._call(
                lambda client, first=first, last=last: client.zrange(
                    self._keys.jobs, first, last, desc=True, withscores=True
                )
            )
            if not page:
                break
            gone = set(self._gone([job for job, _ in page])[0])
            known = [each for each in page if each[0] not in gone]
            found += readable("an entry of the list of jobs", known, _entry)
            at += len(page)
        return found

    def known(self, ids: Sequence[str]) -> list[str]:
        """Return the ids that are those of jobs, in one round trip.  Raises StoreUnavailable."""
        gone = set(self._gone([each.encode() for each in ids])[0])
        return [each for each in ids if each.encode() not in gone]

    def trim(self) -> int:
        """Remove jobs whose keys have expired; return their number.

        One call looks at a part of the list; the next call goes on from there.  Raises
        StoreUnavailable.
        """
        cursor, found = self._call(
            lambda client: client.zscan(self._keys.jobs, self._cursor, count=TRIM_AT_ONCE)
        )
        self._cursor = int(cursor)
        gone, now_ms = self._gone([job for job, _ in found])
        opened_ms = dict(found)
        expired = [job for job in gone if opened_ms[job] < now_ms - OPENING_MS]
        if expired:
            self._call(lambda client: client.zrem(self._keys.jobs, *expired))
        return len(expired)

    def _gone(self, jobs: Sequence[bytes]) -> tuple[list[bytes], int]:
        """Return the jobs without keys, and the server's time in ms, in one round trip."""

        def read(client: Any) -> list[Any]:
            pipe = client.pipeline(transaction=False)
            for job in jobs:
                pipe.exists(self._keys.of(job.decode(errors="replace")).job)
            pipe.time()
            return list(pipe.execute())

        *known, (seconds, micros) = self._call(read)
        gone = [job for job, exists in zip(jobs, known, strict=True) if not exists]
        return gone, seconds * 1000 + micros // 1000

    def _call(self, command: Any) -> Any:
        return self._store.call(command, on_outage=self._on_outage)


def _entry(entry: tuple[bytes, float]) -> tuple[str, int]:
    return entry[0].decode(), int(entry[1])
