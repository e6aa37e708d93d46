"""The list of all jobs that Redis still knows, open or ended, by the time of their opening.

`Ledger.open` adds jobs, clients read the newest, and workers remove the jobs that have expired.
Begin with `JobList.newest`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from resilience.connections import answers_of
from resilience.keys import Keys
from resilience.store import OnOutage, Store
from resilience.validation import readable
from rlm_tasks.jobs import spec as specs

TRIM_AT_ONCE = 500
"""About this many entries are looked at in one call of `trim`."""
AT_ONCE = 1000
"""A page of the list has at most this many jobs."""
MATCHED_AT_ONCE = 5000
"""About this many ids are compared with a prefix in one round trip."""
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

    def newest(
        self,
        limit: int,
        *,
        since_ms: int = 0,
        states: Collection[str] = (),
        operation: str = "",
    ) -> list[tuple[str, int]]:
        """Return (job, ms opened), the newest first; each filter that is given must match.

        It takes two round trips for a page of jobs.  Raises StoreUnavailable.
        """
        found: list[tuple[str, int]] = []
        at = 0
        filtered = bool(states or operation)
        while len(found) < limit:
            size = AT_ONCE if filtered else min(AT_ONCE, limit - len(found))
            page = self._page(at, size)
            recent = [each for each in page if each[1] >= since_ms]
            if filtered:
                kept = self._matching([job for job, _ in recent], states, operation)
            else:
                kept = {job for job, _ in recent} - set(self._gone([job for job, _ in recent])[0])
            known = [each for each in recent if each[0] in kept]
            found += readable("an entry of the list of jobs", known, _entry)
            at += len(page)
            if len(recent) < size:
                break
        return found[:limit]

    def _page(self, at: int, size: int) -> list[tuple[bytes, float]]:
        page: list[tuple[bytes, float]] = self._call(
            lambda client: client.zrange(
                self._keys.jobs, at, at + size - 1, desc=True, withscores=True
            )
        )
        return page

    def _matching(
        self, jobs: Sequence[bytes], states: Collection[str], operation: str
    ) -> set[bytes]:
        """Return the jobs in one of the states, if there are any, and of the operation, if any."""

        def read(client: Any) -> list[Any]:
            pipe = client.pipeline(transaction=False)
            for job in jobs:
                pipe.hmget(self._keys.of(job.decode(errors="replace")).job, "state", "spec")
            return answers_of(pipe)

        return {
            job
            for job, found in zip(jobs, self._call(read) if jobs else (), strict=True)
            if isinstance(found, list)
            and found[0]
            and (not states or found[0].decode(errors="replace") in states)
            and (not operation or specs.operation_of(found[1]) == operation)
        }

    def beginning(self, prefix: str) -> list[tuple[str, int]]:
        """Return (job, ms opened) of the jobs whose ids begin so, the newest first.

        The prefix has no characters of a pattern.  It takes a round trip for about 5,000 jobs.
        Raises StoreUnavailable.
        """
        listed: dict[bytes, float] = dict(
            self._call(
                lambda client: list(
                    client.zscan_iter(self._keys.jobs, match=f"{prefix}*", count=MATCHED_AT_ONCE)
                )
            )
        )
        gone = self._gone(list(listed))[0] if listed else ()
        for job in gone:
            del listed[job]
        found = readable("an entry of the list of jobs", listed.items(), _entry)
        return sorted(found, key=lambda each: -each[1])

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
