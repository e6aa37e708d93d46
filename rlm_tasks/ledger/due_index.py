"""The index of due jobs: when a sweep has to look at each open job.

A worker that stores a wait or a claim writes here first, so a sweep finds the job after a crash.
The ledger and the supervisor use it.  Begin with `DueIndex.look_by`.
"""

from __future__ import annotations

from typing import Any

from resilience.store import Call, OnOutage, Script, Store
from resilience.validation import readable

_TAKE, _LOOK_AGAIN, _LOOK_BY, _FIRST = (
    Script.load("rlm_tasks.ledger", f"due_{name}")
    for name in ("take", "look_again", "look_by", "first")
)


class DueIndex:
    """Open jobs, by the time of their next sweep, in one sorted set."""

    def __init__(self, store: Store, key: str, *, on_outage: OnOutage = "raise") -> None:
        self._store, self._key = store, key
        self._on_outage: OnOutage = on_outage

    def look_by(self, job: str, wait_ms: int) -> Call:
        """Return the call that makes sure of a sweep within `wait_ms`; an earlier time stays."""
        return Call(_LOOK_BY, (self._key,), (job, wait_ms))

    def look_again(self, job: str, at_ms: int, record: str) -> Call:
        """Return the call that records the next sweep of a job that has been swept.

        With 0 the job leaves the index, unless its `record`, a key, says that it is open by now.
        """
        return Call(_LOOK_AGAIN, (self._key, record), (job, at_ms))

    def first(self) -> Call:
        """Return the call that returns the ms until the next sweep of any job; -1: none is due."""
        return Call(_FIRST, (self._key,), (), otherwise=-1)

    def take(self, most: int, sweep_ms: int) -> list[str]:
        """Return at most `most` due jobs, which no other worker gets for `sweep_ms`.

        Raises StoreUnavailable.
        """
        call = Call(_TAKE, (self._key,), (sweep_ms, most))
        [found] = self._store.call(call, on_outage=self._on_outage)
        return readable("an entry of the index of due jobs", found, bytes.decode)

    def jobs(self, most: int) -> list[str]:
        """Return at most `most` open jobs, the next to sweep first.  Raises StoreUnavailable."""
        found: Any = self._store.call(
            lambda client: client.zrange(self._key, 0, most - 1), on_outage=self._on_outage
        )
        return readable("an entry of the index of due jobs", found, bytes.decode)
