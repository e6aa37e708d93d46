"""What a worker and beat write to their log: which job and node a line belongs to, and the shape of
a line.

Decides the shape as long as it is Celery's to choose: handlers and formats that somebody else has
set stay as they are, and find the ids on every record.  Does nothing in a client.  Refuses to know
what is logged; of the arguments and results that Celery hands along with its own lines, none gets
into the log."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from functools import cache
from typing import Any

from celery import Celery, Task, signals
from celery._state import get_current_worker_task
from celery.app.defaults import DEFAULT_PROCESS_LOG_FMT, DEFAULT_TASK_LOG_FMT
from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter, get_multiprocessing_logger

from rlm_tasks.engine.tasks import OURS
from rlm_tasks.settings.model import Settings

IDS = ("job", "node", "operation", "task", "task_id")
"""A record carries them as ``rlm_job``, ``rlm_node`` ..., '' where there is none; a JSON line by
these names.
"""
EACH_MESSAGE = ("celery.worker.strategy", "celery.app.trace")
"""Loggers of Celery that write a line when a message is received, and one when its task has
succeeded.
"""
_TOLD = (("task", "name"), ("task_id", "id"), ("runtime_s", "runtime"))
_OURS = ("rlm_where", *(f"rlm_{name}" for name in IDS))
_PLAIN = {
    *vars(logging.LogRecord("", 0, "", 0, "", (), None)),
    "message",
    "asctime",
    "task_name",
    "task_id",
    *_OURS,
}


def install(app: Celery, settings: Settings) -> None:
    """Have this process write its log as the settings say, should it become a worker or beat of the
    app.
    """
    log = WorkerLog(app, settings.log_format)
    signals.celeryd_init.connect(log.worker_begins, weak=False)
    signals.beat_init.connect(log.beat_begins, weak=False)
    signals.after_setup_logger.connect(log.shape, weak=False)
    signals.after_setup_logger.connect(log.shape_pool, weak=False)
    signals.after_setup_task_logger.connect(log.shape, weak=False)


class WorkerLog:
    """The log of one process, from when it is known to be a worker or beat."""

    def __init__(self, app: Celery, log_format: str) -> None:
        self._app, self._json, self._worker = app, log_format == "json", ""
        self._theirs = False  # the worker is another app's, and a client of ours at most

    def worker_begins(self, sender: str, instance: Any, **_: Any) -> None:
        """Put ids on records before anybody's logging is set up, and also where Celery's is not."""
        self._theirs, self._worker = instance.app is not self._app, sender
        if not self._theirs:
            mark_records()

    def beat_begins(self, sender: Any, **_: Any) -> None:
        """Put ids on records, so that one format does for workers and beat."""
        if sender.app is self._app:
            mark_records()

    def shape(self, logger: logging.Logger, format: str, colorize: bool, **_: Any) -> None:
        """Set the shape of lines on handlers that still have the one which Celery has given
        them.
        """
        if self._theirs:
            return
        mark_records()  # beat tells that it is there after its first lines
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
        """Set the shape of what the pool itself writes, which no other logger sees."""
        self.shape(**{**about, "logger": get_multiprocessing_logger()})


@cache
def mark_records() -> None:
    """Put the ids of the task that runs in this thread on every record, whichever logger makes
    it.
    """
    made = logging.getLogRecordFactory()

    def marked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        ids = ids_of(get_current_worker_task())
        vars(record).update({f"rlm_{name}": ids.get(name, "") for name in IDS})
        vars(record)["rlm_where"] = f" [job {ids['job']} {ids['node']}]" if "job" in ids else ""
        return record

    logging.setLogRecordFactory(marked)
    for name in EACH_MESSAGE:
        logging.getLogger(name).addFilter(demote)


def ids_of(task: Task | None) -> dict[str, str]:
    """Return those of the IDS that are known of a running task; a merge of part of a job has its
    split for a node.
    """
    if task is None:
        return {}
    request = task.request
    ids = {"task": task.name, "task_id": request.id}
    if task.name in OURS and len(request.args or ()) == 2:
        ids["job"], ids["node"] = request.args
        if operation := (request.get("rlm") or {}).get("operation"):
            ids["operation"] = operation
    return ids


def demote(record: logging.LogRecord) -> bool:
    """Leave Celery's lines per message of ours to DEBUG: a node says in one what it has done, and
    may stand aside unheard.
    """
    message = getattr(record, "data", None) or {}
    is_usual = record.levelno == logging.INFO or message.get("description") == "rejected"
    if not is_usual or message.get("name", "") not in OURS:
        return True
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, in one line of ASCII; what was passed as ``extra`` is part of it,
    if it is JSON-able.
    """

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a name that has a meaning of ours keeps it, whatever ``extra`` says."""
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
    """Return what came with a record and can be JSON."""
    extra = {name: value for name, value in vars(record).items() if name not in _PLAIN}
    if record.name.startswith("celery."):
        told = extra.pop("data", None) or {}  # with a task's arguments and its result
        extra |= {name: told[theirs] for name, theirs in _TOLD if theirs in told}
    return {name: value for name, value in extra.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
