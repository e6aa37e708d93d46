"""How a job ended, in words: one row per final status, read by all that show or raise it.

`ledger.explain` takes the sentence from here, `Job.result` the error and its text, `Job.state`
Celery's name, and Flower the colour.  A new final status needs a row in `ENDINGS`; a new cause, one
in `CAUSES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from rlm_tasks.errors import JobCancelled, JobEnded, JobExpired, JobFailed
from rlm_tasks.results import ItemFailure, Progress, Status
from rlm_tasks.tones import Tone as Tone
from rlm_tasks.words import duration, figure, instant


@dataclass(frozen=True, slots=True)
class Ending:
    """One final status, in all forms in which users meet it."""

    verb: str  # follows "It": failed, was cancelled
    celery_state: str
    tone: Tone
    error: type[JobEnded] | None  # raised by Job.result; None: it returns the answer

    @property
    def is_failure(self) -> bool:
        """Whether operators count such a job as failed; a cancelled one is not."""
        return self.tone == "danger"


ENDINGS: dict[Status, Ending] = {
    Status.SUCCEEDED: Ending("succeeded", "SUCCESS", "success", None),
    Status.FAILED: Ending("failed", "FAILURE", "danger", JobFailed),
    Status.EXPIRED: Ending("expired", "FAILURE", "danger", JobExpired),
    Status.CANCELLED: Ending("was cancelled", "REVOKED", "", JobCancelled),
}
CAUSES: dict[str, str] = {
    "early": "enough of its items are done",
    "budget": "its budget is spent",
    "failed": "too many items failed",
    "expired": "its timeout passed",
    "cancelled": "it was cancelled",
}
"""Why a job ended, or is stopping, before its items did: `JobResult.stopped`, in words."""
CELERY_STATES: dict[Status, str] = {
    Status.PENDING: "PENDING",
    Status.RUNNING: "STARTED",
    Status.MERGING: "STARTED",
    **{status: ending.celery_state for status, ending in ENDINGS.items()},
}
"""Celery's name of each status."""
TONES: dict[Status, Tone] = {
    Status.PENDING: "",
    Status.RUNNING: "active",
    Status.MERGING: "active",
    **{status: ending.tone for status, ending in ENDINGS.items()},
}


WITH_FAILURES = "succeeded with failures"
"""How a job is shown that succeeded although some of its items failed."""


def shown(status: Status, failed: int) -> tuple[str, Tone]:
    """Return the words and the colour by which a status is shown; `failed` counts failed items."""
    if status is Status.SUCCEEDED and failed:
        return WITH_FAILURES, "warning"
    return str(status), TONES[status]


IDLE_S = 5.0
"""An open job without a running node is shown as idle after this time."""


def shown_progress(at: Progress) -> tuple[str, Tone]:
    """Return the words and the colour for the status of a job: "running, idle 74 s"."""
    word, tone = shown(at.status, at.failed)
    return (
        (f"{word}, idle {duration(at.idle_s)}", "warning") if at.idle_s > IDLE_S else (word, tone)
    )


def shown_rate(at: Progress) -> float:
    """Return the items per second of a job; 0.0 when it is idle: a mean would look like work."""
    return 0.0 if at.idle_s > IDLE_S else at.rate


def sentence(facts: Mapping[str, str], now_ms: int | None = None) -> str:
    """Return how an ended job ended and its counts of items, from its facts in the ledger.

    It says when a job was cancelled or has expired: how long ago at the server's time `now_ms`, or
    without it the date.  Raises KeyError for a job that has not ended.
    """
    status = Status(facts["state"])
    verb = ENDINGS[status].verb
    done, failed, skipped = facts["done"], facts["failed"], facts["skipped"]
    counts = f"{done} of {facts['n']} items done, {failed} failed, {skipped} skipped"
    if facts.get("error"):
        error = msgspec.json.decode(facts["error"])
        return f"It {verb} because {error['type']}: {error['message']} ({counts})."
    when = stopped_at(facts, now_ms) if status in (Status.CANCELLED, Status.EXPIRED) else ""
    return f"It {verb}{when}{_because(facts, verb)}: {counts}."


def stopped_at(facts: Mapping[str, str], now_ms: int | None = None) -> str:
    """Return when a job was stopped and by whom, with a space before; '' if it is not known."""
    at_ms = int(facts.get("stop_ms") or facts.get("closed_ms") or 0)
    if not at_ms:
        return ""
    by = f" by {facts['stop_by']}" if facts.get("stop_by") else ""
    return f" {instant(at_ms / 1000, None if now_ms is None else now_ms / 1000)}{by}"


def _because(facts: Mapping[str, str], verb: str) -> str:
    cause = CAUSES.get(facts.get("stop", ""), "")
    if facts.get("stop_why") == "queue_timeout":
        waited_s = (int(facts["start_by"]) - int(facts["opened_ms"])) / 1000
        cause = f"no worker began it within its queue_timeout of {figure(waited_s)} s"
    if facts.get("stop") == "failed" and facts["failed"] == "1":
        cause = "an item failed"
    elif facts.get("stop") == "failed" and facts["done"] == "0" and facts["fail_limit"] != "0":
        cause = "no item succeeded"
    if not cause or cause == f"it {verb}":
        return ""
    early = " early" if facts["state"] == Status.SUCCEEDED else ""
    return f"{early} because {cause}"


# --- the error ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Blamed:
    """The failure that an error of a job names: of an item, of a merge, or in a round."""

    failure: ItemFailure
    failed: int  # failed items of the job, or of the round
    total: int
    round: int = 0  # 0: it is the job's own


def named_item(failure: ItemFailure) -> str:
    """Return the number and the place of a failed item: "item 0 (payments.csv, line 1)"."""
    return f"item {failure.index}{f' ({failure.where})' if failure.where else ''}"


def raised_words(failure: ItemFailure, *, message: bool) -> str:
    """Return the class of an exception, and its message or the length of that."""
    shown = failure if message else failure.outline()
    return f"{shown.type}: {shown.message}" if shown.message else shown.type


def how_it_ended(facts: Mapping[str, str], blamed: Blamed | None, *, message: bool) -> str:
    """Return the text of a job's error behind "job ID", with or without the failure's message.

    Raises KeyError for a job that has not ended.
    """
    ended = sentence({**facts, "error": ""} if blamed else facts)
    ended = ended.removeprefix("It ").removesuffix(".")
    if blamed is None:
        return ended
    failure = blamed.failure
    item, words = named_item(failure), raised_words(failure, message=message)
    if facts["state"] != Status.FAILED:
        first = item if failure.index >= 0 else "in its merge"
        return f"{ended}; its first failure, {first}: {words}"
    items = "items of the round" if blamed.round else "items"
    place = f" in round {blamed.round}" if blamed.round else ""
    place += f" at {item}" if failure.index >= 0 else ""
    return f"failed{place}: {words}; {blamed.failed:,} of {blamed.total:,} {items} failed"
