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
from celery.exceptions import TaskPredicate

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
_HERE = Path(__file__).parents[1]
_HIDDEN = (
    *(f"{_HERE / folder}{os.sep}" for folder in ("engine", "ledger", "worker")),
    str(_HERE / "operations" / "registry.py"),
)
"""Files whose frames lie between Celery and the user's function: a traceback leaves them out."""


def failure_of(index: int, error: BaseException, code: str = "") -> dict[str, Any]:
    """Return index, code, type, message and traceback; the platform's own frames are left out."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [frame for frame in frames if not frame.filename.startswith(_HIDDEN)] or frames[-1:]
    text = "".join(traceback.format_list(shown)) + "".join(traceback.format_exception_only(error))
    return {
        "index": index,
        "code": code or classify(error).code,
        "type": type(error).__name__,
        "message": str(error)[:MESSAGE_CHARS],
        "traceback": text[-TRACEBACK_CHARS:],
    }


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
