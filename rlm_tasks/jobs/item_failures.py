"""Failures of items as data that can be stored and shown, and the meaning of Celery's exceptions.

A running node calls `failure_of`; the command line and Flower group failures with `alike`.
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
        trace = vars(BaseException)["__traceback__"].__get__(error)  # its class may hide it
        frames = traceback.extract_tb(trace, limit=-MOST_FRAMES)
        shown = [frame for frame in frames if not frame.filename.startswith(_HIDDEN)]
        return storable("".join(traceback.format_list(shown or frames[-1:])))
    except BaseException:  # the loader of the user's module raised
        return ""


def in_words(type: str, message: str, *, shown: bool) -> str:
    """Return the class and the message of an exception, or the length of the message.

    A message may contain an item, so only the owner of the data may see it.
    """
    if not message:
        return type
    return f"{type}: {message if shown else hidden(message)}"


def hidden(message: str) -> str:
    """Return what stands for a message that is not shown: its length."""
    return f"({len(message)} characters)"


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
