"""The shape of log lines, whose handlers are left alone, and where ids come from."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from celery._state import pop_current_task, push_current_task
from celery.app.defaults import DEFAULT_PROCESS_LOG_FMT
from celery.utils.log import ColorFormatter

from rlm_tasks.celery import app
from rlm_tasks.messaging.dispatch import NODE_TASK
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry import logs
from rlm_tasks.telemetry.logs import JsonFormatter, WorkerLog, demote


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What logging and Celery's signals keep for a whole process is put back."""
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
    """This thread works on a node."""
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


def told(each: logging.LogRecord) -> dict[str, Any]:
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


def test_a_line_has_what_a_reader_looks_for() -> None:
    each = record()
    each.created = 0.25

    line = told(each)

    assert line == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "INFO",
        "logger": "users",
        "message": "said",
        "process": each.process,
        "worker": "celery@host",
    }


@pytest.mark.usefixtures("node")
def test_whatever_a_node_calls_carries_its_ids() -> None:
    logs.mark_records()

    line = told(record(name="requests"))

    assert {name: line[name] for name in logs.IDS} == {
        "job": "j1",
        "node": "n1",
        "operation": "count",
        "task": "rlm.node",
        "task_id": "j1.n1",
    }
    assert vars(record())["rlm_where"] == " [job j1 n1]"


def test_outside_of_nodes_ids_are_empty_and_format_names_may_be_used() -> None:
    logs.mark_records()

    assert (
        logging.Formatter("%(rlm_job)s|%(rlm_node)s|%(rlm_task)s%(rlm_where)s").format(record())
        == "||"
    )


def test_a_factory_of_somebody_else_is_kept() -> None:
    logging.setLogRecordFactory(lambda *args, **kwargs: _signed(logging.LogRecord(*args, **kwargs)))
    logs.mark_records()

    assert told(record())["signed"] == "theirs"


def _signed(each: logging.LogRecord) -> logging.LogRecord:
    vars(each)["signed"] = "theirs"
    return each


def test_extra_is_kept_as_far_as_it_is_json_and_changes_no_field_of_ours() -> None:
    circle: list[Any] = []
    circle.append(circle)

    line = told(
        record(
            tags=["a"], level="low", bad=object(), circle=circle, nan=float("nan"), data={"own": 1}
        )
    )

    assert (line["tags"], line["level"], line["data"]) == (["a"], "INFO", {"own": 1})
    assert not {"bad", "circle", "nan"} & set(line)


def test_a_line_is_one_line_whatever_is_said() -> None:
    assert (
        told(record("two\nlines, \ud800 and \u20ac"))["message"] == "two\nlines, \ud800 and \u20ac"
    )


def test_an_exception_comes_with_its_traceback() -> None:
    each = record()
    try:
        raise ValueError("bad")
    except ValueError:
        each.exc_info = sys.exc_info()

    assert told(each)["exception"].splitlines()[0] == "Traceback (most recent call last):"
    assert told(each)["exception"].splitlines()[-1] == "ValueError: bad"
    each.exc_info = (None, None, None)
    assert "exception" not in told(each)


def test_arguments_and_results_of_tasks_are_left_out() -> None:
    data = {
        "id": "t1",
        "name": "theirs.pay",
        "runtime": 0.5,
        "args": "('secret',)",
        "return_value": "'secret'",
    }

    line = told(record("Task succeeded", name="celery.app.trace", data=data))

    assert (line["task"], line["task_id"], line["runtime_s"]) == ("theirs.pay", "t1", 0.5)
    assert "secret" not in str(line)


def test_celerys_own_format_gets_the_ids_or_becomes_json() -> None:
    logs.mark_records()

    text = shaped(handler(ColorFormatter(DEFAULT_PROCESS_LOG_FMT, use_color=False)))
    as_json = shaped(handler(ColorFormatter(DEFAULT_PROCESS_LOG_FMT, use_color=False)), "json")

    assert text is not None
    assert text.format(record()).endswith("] said")
    assert isinstance(as_json, JsonFormatter)


class OwnFormatter(ColorFormatter):  # type: ignore[misc]  # Celery ships no types
    """What somebody has made of Celery's."""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_formatter_of_somebody_else_stays(log_format: str) -> None:
    theirs = OwnFormatter("%(message)s", use_color=False)

    assert shaped(handler(theirs), log_format) is theirs


def test_a_format_of_the_users_stays_when_text_is_asked_for() -> None:
    own = handler(ColorFormatter("mine: %(message)s", use_color=False))

    assert shaped(own, format="mine: %(message)s") is own.formatter
    assert own.format(record()) == "mine: said"
    assert isinstance(shaped(own, "json", format="mine: %(message)s"), JsonFormatter)


def test_celerys_lines_per_message_are_for_debug(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_node_that_goes_back_is_for_debug_and_other_warnings_are_not(
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


def test_nothing_changes_but_in_a_worker_of_the_app() -> None:
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

    logs.install(app, Settings(log_format="json"))
    start(Celery("theirs", set_as_current=False))
    assert logging.getLogRecordFactory() is before
    assert type(own.formatter) is ColorFormatter

    start(app)
    assert logging.getLogRecordFactory() is not before
    assert told_by(own)["worker"] == "celery@host"


def told_by(own: logging.Handler) -> dict[str, Any]:
    return json.loads(own.format(record()))  # type: ignore[no-any-return]
