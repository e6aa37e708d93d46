"""Log lines: their format, the ids of nodes in them, and handlers that are left as they are."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import RestartFreqExceeded
from celery import Celery, signals
from celery._state import pop_current_task, push_current_task
from celery.app.defaults import DEFAULT_PROCESS_LOG_FMT
from celery.utils.log import ColorFormatter
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ReadOnlyError, ResponseError

from rlm_tasks.celery import app
from rlm_tasks.messaging.dispatch import NODE_TASK
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry import logs
from rlm_tasks.telemetry.logs import JsonFormatter, WorkerLog, demote


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the logging and the signals of Celery that belong to the whole process."""
    factory = logging.getLogRecordFactory()
    logs.mark_records.cache_clear()
    for signal in (
        signals.celeryd_init,
        signals.beat_init,
        signals.after_setup_logger,
        signals.after_setup_task_logger,
    ):
        monkeypatch.setattr(signal, "receivers", [])
        monkeypatch.setattr(signal, "sender_receivers_cache", type(signal.sender_receivers_cache)())
    yield
    logging.setLogRecordFactory(factory)
    logs.mark_records.cache_clear()
    for name in logs.EACH_MESSAGE:
        logging.getLogger(name).removeFilter(demote)


@pytest.fixture
def node() -> Iterator[None]:
    """Let this thread work on a node."""
    task = app.tasks[NODE_TASK]
    task.push_request(
        id="j1.n1", args=["j1", "n1"], rlm={"operation": "count"}, called_directly=False
    )
    push_current_task(task)
    yield
    pop_current_task()
    task.pop_request()


def record(message: str = "said", name: str = "users", **extra: Any) -> logging.LogRecord:
    return logging.getLogger(name).makeRecord(
        name, logging.INFO, "f.py", 1, message, (), None, extra=extra
    )


def line_of(each: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter("celery@host").format(each)
    assert line.isascii()
    assert "\n" not in line
    return json.loads(line)  # type: ignore[no-any-return]


def handler(formatter: logging.Formatter) -> logging.Handler:
    own = logging.StreamHandler()
    own.setFormatter(formatter)
    return own


def shaped(
    own: logging.Handler, log_format: str = "text", format: str = DEFAULT_PROCESS_LOG_FMT
) -> logging.Formatter | None:
    logger = logging.Logger("shaped")
    logger.addHandler(own)
    WorkerLog(app, log_format).shape(logger, format, False)
    return own.formatter


def test_the_fields_of_a_line() -> None:
    each = record()
    each.created = 0.25

    line = line_of(each)

    assert line == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "INFO",
        "logger": "users",
        "message": "said",
        "process": each.process,
        "worker": "celery@host",
    }


@pytest.mark.usefixtures("node")
def test_every_line_logged_in_a_node_has_its_ids() -> None:
    logs.mark_records()

    line = line_of(record(name="requests"))

    assert {name: line[name] for name in logs.IDS} == {
        "job": "j1",
        "node": "n1",
        "operation": "count",
        "task": "rlm.node",
        "task_id": "j1.n1",
    }
    assert vars(record())["rlm_where"] == " [job j1 n1]"


def test_outside_of_nodes_the_ids_are_empty() -> None:
    logs.mark_records()

    assert (
        logging.Formatter("%(rlm_job)s|%(rlm_node)s|%(rlm_task)s%(rlm_where)s").format(record())
        == "||"
    )


def test_another_record_factory_is_kept() -> None:
    logging.setLogRecordFactory(lambda *args, **kwargs: _signed(logging.LogRecord(*args, **kwargs)))
    logs.mark_records()

    assert line_of(record())["signed"] == "theirs"


def _signed(each: logging.LogRecord) -> logging.LogRecord:
    vars(each)["signed"] = "theirs"
    return each


def test_extra_fields_are_kept_if_they_are_json_and_replace_no_field_of_ours() -> None:
    circle: list[Any] = []
    circle.append(circle)

    line = line_of(
        record(
            tags=["a"], level="low", bad=object(), circle=circle, nan=float("nan"), data={"own": 1}
        )
    )

    assert (line["tags"], line["level"], line["data"]) == (["a"], "INFO", {"own": 1})
    assert not {"bad", "circle", "nan"} & set(line)


def test_a_message_with_line_breaks_is_one_line() -> None:
    assert (
        line_of(record("two\nlines, \ud800 and \u20ac"))["message"]
        == "two\nlines, \ud800 and \u20ac"
    )


def test_an_exception_is_logged_with_its_traceback() -> None:
    each = record()
    try:
        raise ValueError("bad")
    except ValueError:
        each.exc_info = sys.exc_info()

    assert line_of(each)["exception"].splitlines()[0] == "Traceback (most recent call last):"
    assert line_of(each)["exception"].splitlines()[-1] == "ValueError: bad"
    each.exc_info = (None, None, None)
    assert "exception" not in line_of(each)


def caused(error: Exception, cause: Exception) -> Exception:
    """Return an error with a cause."""
    error.__cause__ = cause
    return error


OUTAGE = RedisConnectionError("reset by peer")


@pytest.mark.parametrize(
    ("name", "error", "is_short"),
    [
        ("celery.worker.request", OUTAGE, True),
        ("kombu.transport.redis", NoPermissionError("no right"), True),
        ("celery.backends.redis", caused(ValueError("join"), OUTAGE), True),
        ("multiprocessing", caused(OSError(), ReadOnlyError("replica")), True),
        ("celery.worker.consumer.consumer", RestartFreqExceeded("5 in 1s"), True),
        ("celery.worker.request", ValueError("bad"), False),
        ("celery.worker.request", ResponseError("wrong number of arguments"), False),
        ("celery.app.trace", OUTAGE, False),  # perhaps of a Redis that the task has called
        ("shop.tasks", OUTAGE, False),
    ],
)
def test_an_outage_of_redis_is_one_line_of_celery(
    name: str, error: Exception, is_short: bool
) -> None:
    each = record("Couldn't ack")
    each.name, each.exc_info = name, (type(error), error, None)

    logs.tell_outage_in_one_line(each)

    assert (each.exc_info is None) == is_short
    assert (type(error).__name__ in each.getMessage()) == is_short


def test_arguments_and_results_of_tasks_are_left_out() -> None:
    data = {
        "id": "t1",
        "name": "theirs.pay",
        "runtime": 0.5,
        "args": "('secret',)",
        "return_value": "'secret'",
    }

    line = line_of(record("Task succeeded", name="celery.app.trace", data=data))

    assert (line["task"], line["task_id"], line["runtime_s"]) == ("theirs.pay", "t1", 0.5)
    assert "secret" not in str(line)


def test_the_format_of_celery_gets_the_ids_or_becomes_json() -> None:
    logs.mark_records()

    text = shaped(handler(ColorFormatter(DEFAULT_PROCESS_LOG_FMT, use_color=False)))
    as_json = shaped(handler(ColorFormatter(DEFAULT_PROCESS_LOG_FMT, use_color=False)), "json")

    assert text is not None
    assert text.format(record()).endswith("] said")
    assert isinstance(as_json, JsonFormatter)


class OwnFormatter(ColorFormatter):  # type: ignore[misc]  # Celery ships no types
    """A user's formatter, derived from Celery's."""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_another_formatter_is_kept(log_format: str) -> None:
    theirs = OwnFormatter("%(message)s", use_color=False)

    assert shaped(handler(theirs), log_format) is theirs


def test_a_format_of_the_user_is_kept_unless_json_is_set() -> None:
    own = handler(ColorFormatter("mine: %(message)s", use_color=False))

    assert shaped(own, format="mine: %(message)s") is own.formatter
    assert own.format(record()) == "mine: said"
    assert isinstance(shaped(own, "json", format="mine: %(message)s"), JsonFormatter)


def test_lines_of_celery_for_each_message_are_debug_lines(caplog: pytest.LogCaptureFixture) -> None:
    logs.mark_records()
    trace = logging.getLogger(logs.EACH_MESSAGE[1])
    ours, theirs = {"name": NODE_TASK, "id": "j1"}, {"name": "theirs.pay", "id": "t1"}

    for level in (logging.INFO, logging.DEBUG):
        with caplog.at_level(level, trace.name):
            trace.info("Task succeeded", extra={"data": ours})
            trace.info("Task succeeded", extra={"data": theirs})

    assert [(each.levelname, vars(each)["data"]) for each in caplog.records] == [
        ("INFO", theirs),
        ("DEBUG", ours),
        ("INFO", theirs),
    ]


def test_a_rejected_message_is_a_debug_line_and_other_warnings_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logs.mark_records()
    trace = logging.getLogger(logs.EACH_MESSAGE[1])

    with caplog.at_level(logging.INFO, trace.name):
        for description in ("rejected", "raised unexpected"):
            trace.warning(
                "Task", extra={"data": {"name": NODE_TASK, "id": "j1", "description": description}}
            )

    assert [vars(each)["data"]["description"] for each in caplog.records] == ["raised unexpected"]


def test_logging_changes_only_in_a_worker_of_the_app() -> None:
    before = logging.getLogRecordFactory()
    own = handler(ColorFormatter(DEFAULT_PROCESS_LOG_FMT, use_color=False))
    logger = logging.Logger("root")
    logger.addHandler(own)

    def start(whose: Celery) -> None:
        signals.celeryd_init.send(
            sender="celery@host", instance=SimpleNamespace(app=whose), conf=None, options=None
        )
        signals.after_setup_logger.send(
            sender=None,
            logger=logger,
            loglevel=logging.INFO,
            logfile=None,
            format=DEFAULT_PROCESS_LOG_FMT,
            colorize=False,
        )

    logs.install_logs(app, Settings(log_format="json"))
    start(Celery("theirs", set_as_current=False))
    assert logging.getLogRecordFactory() is before
    assert type(own.formatter) is ColorFormatter

    start(app)
    assert logging.getLogRecordFactory() is not before
    assert line_of_handler(own)["worker"] == "celery@host"


def line_of_handler(own: logging.Handler) -> dict[str, Any]:
    return json.loads(own.format(record()))  # type: ignore[no-any-return]


ODD = "\x1b[2J\x9b5m\x1b]0;title\x07\u202e\ud800"
SHOWN = r"\x1b[2J\x9b5m\x1b]0;title\x07\u202e\ud800"


@pytest.mark.parametrize("name", ["rlm_tasks.engine", "rlm.alerts", "celery.app.trace"])
def test_a_line_of_the_platform_sends_nothing_to_the_terminal(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logs.mark_records()

    logging.getLogger(name).warning("job %s\n\tfailed", ODD)

    assert caplog.messages[-1] == f"job {SHOWN}\n\tfailed"


@pytest.mark.parametrize("name", ["shop", "celery.redirected"])
def test_a_users_own_line_keeps_its_colours_but_not_those_of_exceptions(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logs.mark_records()

    try:
        raise ValueError(ODD)
    except ValueError:
        logging.getLogger(name).exception("\x1b[31mred")

    record = caplog.records[-1]
    formatted = ColorFormatter("%(message)s", use_color=False).format(record)
    assert record.getMessage() == "\x1b[31mred"
    assert formatted.startswith("\x1b[31mred\nTraceback")
    assert formatted.endswith(f"ValueError: {SHOWN}")


def test_an_exception_without_odd_characters_is_left_to_the_formatter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logs.mark_records()

    try:
        raise ValueError("plain")
    except ValueError:
        logging.getLogger("rlm_tasks").exception("not done")

    record = caplog.records[-1]
    assert record.exc_info is not None
    assert record.exc_text is None or "\\x" not in record.exc_text
