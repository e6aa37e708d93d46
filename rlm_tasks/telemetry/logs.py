"""The log of a worker and of beat: job and node on each record, and lines as text or JSON.

`installation` calls `install_logs`, which does nothing in a client.  It changes only Celery's own
formatters; other handlers and formats stay, and find the ids on every record.  Arguments and
results of tasks, which Celery passes with its own lines, are never logged.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from functools import cache
from typing import Any

from billiard.exceptions import RestartFreqExceeded
from celery import Celery, Task, signals
from celery._state import get_current_worker_task
from celery.app.defaults import DEFAULT_PROCESS_LOG_FMT, DEFAULT_TASK_LOG_FMT
from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter, get_multiprocessing_logger

from resilience.connections import is_outage, told
from resilience.errors import printable
from rlm_tasks.engine.tasks import OURS
from rlm_tasks.messaging.dispatch import legible, read_header
from rlm_tasks.settings.model import Settings

IDS = ("job", "node", "operation", "task", "task_id")
"""A JSON line has the ids under these names, a record as ``rlm_job``, ``rlm_node`` and so on.

A record without an id has '' for it.
"""
EACH_MESSAGE = ("celery.worker.strategy", "celery.app.trace")
"""Celery's loggers with one line for each received message, and one for each succeeded task."""
PLATFORM = ("celery", "kombu", "multiprocessing", "resilience", "rlm", "scheduler")
"""The beginnings of the names of loggers that are not the user's own."""
PRINTED = "celery.redirected"
"""Celery's logger of lines that a user's code prints."""
_PLAIN_FORMATTER = logging.Formatter()
TASKS, FROM_PARTS = "celery.app.trace", ("celery", "kombu", "multiprocessing")
"""Celery's logger of the errors of tasks, and the beginnings of the names of its other loggers."""
_FROM_CELERY = (("task", "name"), ("task_id", "id"), ("runtime_s", "runtime"))
"""Fields that a JSON line takes from the data of Celery's own lines."""
_OURS = ("rlm_where", *(f"rlm_{name}" for name in IDS))
_PLAIN = {
    *vars(logging.LogRecord("", 0, "", 0, "", (), None)),
    "message",
    "asctime",
    "task_name",
    "task_id",
    *_OURS,
}


def install_logs(app: Celery, settings: Settings) -> None:
    """Set the log format of this process, if it becomes a worker or beat of the app."""
    log = WorkerLog(app, settings.log_format)
    signals.celeryd_init.connect(log.worker_begins, weak=False)
    signals.beat_init.connect(log.beat_begins, weak=False)
    signals.after_setup_logger.connect(log.shape, weak=False)
    signals.after_setup_logger.connect(log.shape_pool, weak=False)
    signals.after_setup_task_logger.connect(log.shape, weak=False)


class WorkerLog:
    """The log of one process, which becomes a worker or beat."""

    def __init__(self, app: Celery, log_format: str) -> None:
        self._app, self._json, self._worker = app, log_format == "json", ""
        self._is_other_app = False  # the worker runs another app, and at most submits our jobs

    def worker_begins(self, sender: str, instance: Any, **_: Any) -> None:
        """Put ids on records, before logging is set up and also if Celery does not set it up."""
        self._is_other_app, self._worker = instance.app is not self._app, sender
        if not self._is_other_app:
            mark_records()

    def beat_begins(self, sender: Any, **_: Any) -> None:
        """Put ids on records, so that workers and beat can have the same format."""
        if sender.app is self._app:
            mark_records()

    def shape(self, logger: logging.Logger, format: str, colorize: bool, **_: Any) -> None:
        """Set the format of each handler that still has Celery's formatter."""
        if self._is_other_app:
            return
        mark_records()  # beat writes its first lines before `beat_begins`
        for handler in logger.handlers:
            given: Any = handler.formatter
            if type(given) not in (ColorFormatter, TaskFormatter):
                continue
            if self._json:
                handler.setFormatter(JsonFormatter(self._worker))
            elif format in (DEFAULT_PROCESS_LOG_FMT, DEFAULT_TASK_LOG_FMT):
                handler.setFormatter(
                    type(given)(f"{format}%(rlm_where)s", use_color=colorize, datefmt=given.datefmt)
                )

    def shape_pool(self, **about: Any) -> None:
        """Set the format of the pool's own logger, which does not propagate."""
        self.shape(**{**about, "logger": get_multiprocessing_logger()})


@cache
def mark_records() -> None:
    """Put the ids of the task that runs in this thread on every record of every logger."""
    make = logging.getLogRecordFactory()

    def marked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        ids = ids_of(get_current_worker_task())
        vars(record).update({f"rlm_{name}": ids.get(name, "") for name in IDS})
        vars(record)["rlm_where"] = f" [job {ids['job']} {ids['node']}]" if "job" in ids else ""
        tell_outage_in_one_line(record)
        make_printable(record)
        return record

    logging.setLogRecordFactory(marked)
    for name in EACH_MESSAGE:
        logging.getLogger(name).addFilter(demote)


def ids_of(task: Task | None) -> dict[str, str]:
    """Return the IDS of a running task, as far as they are known.

    For the merge of a split, the node's id is that of the split.
    """
    if task is None:
        return {}
    request = task.request
    ids = {"task": task.name, "task_id": request.id}
    if task.name in OURS and len(request.args or ()) == 2:
        ids["job"], ids["node"] = map(legible, request.args)
        if operation := read_header(request.get("rlm")).operation:
            ids["operation"] = legible(operation)
    return ids


def demote(record: logging.LogRecord) -> bool:
    """Lower Celery's lines about messages of jobs to level DEBUG; return whether to log the record.

    A node writes one line about its work by itself, and none when it goes back to the queue.
    """
    message = getattr(record, "data", None) or {}
    is_usual = record.levelno == logging.INFO or message.get("description") == "rejected"
    if not is_usual or message.get("name", "") not in OURS:
        return True
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def tell_outage_in_one_line(record: logging.LogRecord) -> None:
    """Replace the traceback of an outage of Redis by its error, in lines of Celery's own parts.

    The lines about tasks keep it: a task of the app may have called a Redis of its own.
    """
    error = record.exc_info[1] if record.exc_info else None
    if record.name == TASKS or not record.name.startswith(FROM_PARTS):
        return
    if isinstance(error, RestartFreqExceeded) or is_outage(error):
        record.msg = f"{record.getMessage()} ({told(error)})"
        record.args, record.exc_info = (), None


def make_printable(record: logging.LogRecord) -> None:
    """Write characters that control a terminal as escapes, in our lines and in Celery's own.

    They come from exceptions and from records in Redis.  The lines that a user's code logs or
    prints stay as they are, but for the texts of exceptions.
    """
    if record.name.startswith(PLATFORM) and record.name != PRINTED:
        try:
            message = record.getMessage()
        except Exception:  # its arguments do not fit: `logging` reports that
            return
        if (shown := printable(message)) != message:
            record.msg, record.args = shown, ()
    if record.exc_info and record.exc_info[0]:
        told_in_full = _PLAIN_FORMATTER.formatException(record.exc_info)
        if (shown := printable(told_in_full)) != told_in_full:
            record.exc_text = shown


class JsonFormatter(logging.Formatter):
    """One JSON object for each record, in one line of ASCII.

    Fields passed as ``extra`` are part of it, if they can be JSON.
    """

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a field of ``extra`` does not replace one of ours."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if self._worker:
            line["worker"] = self._worker
        line |= {name: value for name in IDS if (value := getattr(record, f"rlm_{name}", ""))}
        if record.exc_info and record.exc_info[0]:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(
            line | {name: value for name, value in _extra(record).items() if name not in line}
        )


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """Return the extra fields of a record that can be JSON."""
    extra = {name: value for name, value in vars(record).items() if name not in _PLAIN}
    if record.name.startswith("celery."):
        data = extra.pop("data", None) or {}  # it has the task's arguments and its result
        extra |= {name: data[theirs] for name, theirs in _FROM_CELERY if theirs in data}
    return {name: value for name, value in extra.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
