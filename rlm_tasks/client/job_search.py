"""Find jobs again: in the list of all jobs by filters, or by the beginning of an id.

`Client.job`, `Client.jobs` and `Client.listed` call it.  Begin with `newest`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from resilience.errors import RlmError
from resilience.validation import tell_unreadable
from rlm_tasks.client.job_reader import progress_of
from rlm_tasks.errors import MOST_LISTED, InvalidRequest, JobNotFound, JobUnreadable
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.storable import is_text
from rlm_tasks.ledger.job_counters import JobReading, read_counters
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.results import Progress, Status
from rlm_tasks.words import age

SHORT_ID = 8
"""Lists show this many characters of an id."""
_BEGINNING = re.compile(r"[0-9a-f][0-9a-f-]{3,35}")
"""A short id has at least 4 characters of an id, which has 36."""
_EPOCH_S = 1e9
"""An age of this many seconds is no age but a time since 1970."""
_END_S = 253_402_300_800
"""The end of the year 9999."""


# --- by the beginning of an id ----------------------------------------------------------------


def full_id(ledger: Ledger, job: Any) -> str:
    """Return the id of a job from the id or its beginning.

    A full id takes one round trip.  Raises JobNotFound, InvalidRequest when several ids begin so.
    """
    if not isinstance(job, str):
        raise InvalidRequest("job", job, "must be the id of a job, a text")
    if not is_text(job):
        raise JobNotFound(ascii(job))
    if ledger.job_list.known([job]):
        return job
    prefix = job.strip().rstrip("….").lower()
    if not _BEGINNING.fullmatch(prefix):
        raise JobNotFound(job)
    found = [id for id, _ in ledger.job_list.beginning(prefix)]
    if not found:
        raise JobNotFound(job)
    if len(found) > 1:
        raise InvalidRequest("job", job, _several(ledger, found))
    return found[0]


def _several(ledger: Ledger, found: Sequence[str]) -> str:
    shown = found[:MOST_LISTED]
    size = _distinct(found)
    now = ledger.clock()
    described = [
        f"{spec.job[:size]} ({spec.operation}, {age(now - at.submitted_at)})"
        for spec, at in listed(ledger, shown)
    ]
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    return (
        f"{len(found)} jobs have ids that begin so: {', '.join(described)}{more}; "
        "give more characters"
    )


def _distinct(ids: Sequence[str]) -> int:
    """Return the number of characters, at least 8, by which these ids differ."""
    return next(size for size in range(SHORT_ID, 37) if len({id[:size] for id in ids}) == len(ids))


# --- by filters -------------------------------------------------------------------------------


def newest(ledger: Ledger, limit: int, operation: Any, status: Any, since: Any) -> list[str]:
    """Return the ids of the newest jobs that match the filters of `Client.jobs`, newest first.

    Raises InvalidRequest, StoreUnavailable.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InvalidRequest("limit", limit, "must be a number of jobs, such as 100")
    if not isinstance(operation, str | None) or operation == "":
        raise InvalidRequest("operation", operation, "must be the name of an operation")
    found = ledger.job_list.newest(
        limit,
        operation=operation or "",
        states=_states(status),
        since_ms=_since_ms(ledger, since),
    )
    return [job for job, _ in found]


def _states(status: Any) -> frozenset[str]:
    if status is None:
        return frozenset()
    wanted = [status] if isinstance(status, str) or not isinstance(status, Iterable) else [*status]
    for each in wanted:
        if each not in list(Status):
            raise InvalidRequest("status", each, _right_status(each))
    if not wanted:
        raise InvalidRequest("status", status, "is empty; name a status, or leave it out")
    return frozenset(map(str, wanted))


def _right_status(given: Any) -> str:
    known = [str(each) for each in Status]
    near = difflib.get_close_matches(str(given).lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"is no status; there are {', '.join(known)}{hint}"


def _since_ms(ledger: Ledger, since: Any) -> int:
    """Return the ms since 1970 from which a job counts.  Raises InvalidRequest."""
    if since is None:
        return 0
    if isinstance(since, datetime):
        return _ms_of(since)
    seconds = since.total_seconds() if isinstance(since, timedelta) else since
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidRequest("since", since, "must be seconds, a timedelta or a datetime")
    if not 0 <= seconds < math.inf:
        raise InvalidRequest("since", since, "must be an age of 0 s or more, such as 3600")
    if seconds is since and seconds >= _EPOCH_S:
        advice = "an age in seconds is meant; for a time pass datetime.fromtimestamp(...)"
        raise InvalidRequest("since", since, advice)
    return ledger.clock.now_ms() - math.floor(seconds * 1000)


def _ms_of(at: datetime) -> int:
    """Return a time as ms since 1970; without a zone it is local time."""
    try:
        return math.ceil(at.timestamp() * 1000)
    except (ValueError, OverflowError, OSError):  # the year 1, or 9999, in a zone of this machine
        return 0 if at.year < 1970 else _END_S * 1000


# --- their specification and progress ---------------------------------------------------------


def listed(ledger: Ledger, jobs: Sequence[str]) -> list[tuple[JobSpec, Progress]]:
    """Return specification and progress of each job; one that has expired is left out.

    A job with a record that cannot be read is left out, too, and logged.
    """
    every = zip(jobs, read_counters(ledger, jobs), strict=True)
    return [each for job, reading in every for each in _listed(job, reading)]


def _listed(job: str, reading: JobReading | RlmError) -> Iterator[tuple[JobSpec, Progress]]:
    if isinstance(reading, RlmError):
        tell_unreadable(f"job {job}", type(reading).__name__)
    elif facts := reading.parts[0].facts:
        try:
            spec = specs.load(facts.get("spec", "").encode(), job)
        except JobUnreadable as error:
            spec = specs.unreadable(error, facts)
        yield spec, progress_of(reading)
