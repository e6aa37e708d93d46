"""The thread of a worker that monitors the platform."""

from __future__ import annotations

import threading

import pytest
from kombu.exceptions import OperationalError

from rlm_tasks.worker.monitor_thread import MonitorThread
from tests.support import wait_until


class Scripted:
    """A monitor with given outcomes, which counts its runs."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes, self.runs = list(outcomes), 0

    def look(self) -> None:
        self.runs += 1
        if self.outcomes and (outcome := self.outcomes.pop(0)):
            raise outcome


class Quiet:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_the_thread_runs_the_monitor_survives_errors_and_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor, alerts = (
        Scripted(OperationalError("no broker"), ValueError("unexpected"), None),
        Quiet(),
    )
    thread = MonitorThread(monitor, alerts)  # type: ignore[arg-type]
    thread.start()
    for asked in range(1, 4):
        thread.ask()
        wait_until(lambda asked=asked: monitor.runs == asked)  # type: ignore[misc]
    assert "not known" in caplog.text
    assert "unexpected" in caplog.text
    thread.stop()
    assert (thread.is_alive(), alerts.closed, monitor.runs) == (False, True, 3)


def test_a_request_to_a_busy_thread_returns_at_once() -> None:
    going, go_on = threading.Event(), threading.Event()

    class Slow(Scripted):
        def look(self) -> None:
            super().look()
            going.set()
            assert go_on.wait(20)

    monitor = Slow()
    thread = MonitorThread(monitor, Quiet())  # type: ignore[arg-type]
    thread.start()
    thread.ask()
    assert going.wait(20)
    for _ in range(5):
        thread.ask()
    go_on.set()
    wait_until(lambda: monitor.runs == 2)
    thread.stop()
    assert monitor.runs == 2, "the requests made meanwhile are one run"
