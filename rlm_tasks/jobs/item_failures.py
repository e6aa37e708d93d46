"""Failures of items as data that can be stored and shown, and the meaning of Celery's exceptions.

A running node calls `failure_of`; the command line and Flower group failures with `alike`.  The
text of a user's exception may contain an item: `outline`, `is_ours` and `places` keep it out of
logs, spans and reports.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.exceptions import TaskPredicate, WorkerShutdown, WorkerTerminate

from resilience.errors import is_a, name_of, storable, text_of
from resilience.faults import CANCELLED, TIMEOUT, WORKER_LOST, classify, register

if TYPE_CHECKING:
    from types import TracebackType

    from rlm_tasks.results import ItemFailure

for _error, _fault in {
    SoftTimeLimitExceeded: TIMEOUT,
    TimeLimitExceeded: TIMEOUT,
    WorkerLostError: WORKER_LOST,
    TaskPredicate: CANCELLED,  # Retry, Ignore, Reject: control flow, no error
}.items():
    register(_error, _fault)

TRACEBACK_CHARS = 4000
"""Characters of a traceback that are kept: the last ones."""
MESSAGE_CHARS = 1000
MOST_FRAMES = 200
"""Frames of a traceback that are read: the last ones."""
_HERE = Path(__file__).parents[1]
_HIDDEN = (
    *(f"{_HERE / folder}{os.sep}" for folder in ("engine", "jobs", "ledger", "worker")),
    f"{_HERE.parent / 'resilience'}{os.sep}",
    str(_HERE / "operations" / "registry.py"),
)
"""Files whose frames lie between Celery and the user's function: a traceback leaves them out."""
_OURS = tuple(
    f"{_HERE.parent / package}{os.sep}" for package in ("resilience", "rlm_tasks", "scheduler")
)
SAID = ", as its operation says: "
"""Stands between the guard and the operation's own words in the reason why a node waits."""


def failure_of(index: int, error: BaseException, code: str = "") -> dict[str, Any]:
    """Return index, code, type, message and traceback; the platform's own frames are left out.

    It never raises, whatever the class of the exception does.
    """
    message = text_of(error, TRACEBACK_CHARS)
    text = f"{_frames_of(error)}{name_of(error)}: {message}\n"
    return {
        "index": index,
        "code": code or classify(error).code,
        "type": name_of(error),
        "message": message[:MESSAGE_CHARS],
        "traceback": text[-TRACEBACK_CHARS:],
    }


def raise_if_shutdown(error: BaseException) -> None:
    """Raise an exception again by which a signal ends this worker.

    Only Celery's handler of a signal raises it, in a worker without pool processes.  Each other
    exception in an operation is the failure of its item, also KeyboardInterrupt and SystemExit.
    """
    if is_a(error, (WorkerShutdown, WorkerTerminate)):
        from celery.worker import state  # a client needs no worker

        if state.should_stop is not None or state.should_terminate is not None:
            raise error


def _frames_of(error: BaseException) -> str:
    """Return the user's last frames; '' if the code that made them does not allow it."""
    try:
        frames = traceback.extract_tb(_trace_of(error), limit=-MOST_FRAMES)
        shown = [frame for frame in frames if not frame.filename.startswith(_HIDDEN)]
        return storable("".join(traceback.format_list(shown or frames[-1:])))
    except BaseException:  # the loader of the user's module raised
        return ""


def outline(reason: str) -> str:
    """Return the reason why a node waits without the operation's own words."""
    return reason.partition(SAID)[0]


def is_ours(error: BaseException) -> bool:
    """Whether the platform has raised an exception itself, so that its text contains no item."""
    trace = _trace_of(error)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or trace.tb_frame.f_code.co_filename.startswith(_OURS)


def places(error: BaseException) -> str:
    """Return the class of an exception and the frames of its traceback, without its message."""
    return f"{''.join(traceback.format_tb(_trace_of(error), limit=-MOST_FRAMES))}{name_of(error)}"


def _trace_of(error: BaseException) -> TracebackType | None:
    """Return the traceback of an exception, whose class may hide it."""
    found: TracebackType | None = vars(BaseException)["__traceback__"].__get__(error)
    return found


def alike(failures: Iterable[ItemFailure]) -> list[tuple[str, str, list[int]]]:
    """Return (type, code, indexes of the items) of failures with the same type and code.

    The most frequent kind is first.
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for each in failures:
        kinds.setdefault((each.type, each.code), []).append(each.index)
    return sorted(
        ((*kind, indexes) for kind, indexes in kinds.items()), key=lambda row: -len(row[2])
    )
