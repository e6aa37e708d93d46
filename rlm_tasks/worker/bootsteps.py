"""The boot steps that Celery starts and stops with a worker."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import bootsteps, signals

from rlm_tasks.worker.supervisor import Supervisor
from rlm_tasks.worker.upstream import handle_sigterm

GROUP_SIGNAL_S = 0.5
"""A SIGTERM to the process group has reached the main process, too, within this time."""


class SupervisorStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Run the guard, and drain before the pool is asked to stop: by signal, remote control or error
    alike.
    """

    requires = {"celery.worker.components:Pool"}

    def create(self, worker: Any) -> None:
        """Import what pool processes are to share."""
        from rlm_tasks.llm.endpoint_checks import checks_of

        self._checks = checks_of(worker.app.rlm_runtime())

    def start(self, worker: Any) -> None:
        """Start once the pool has forked."""
        from rlm_tasks.worker.monitor_thread import (
            monitor_thread,
        )  # alerts and webhooks are of no use to clients

        def queues() -> list[str]:
            consumer = getattr(worker.consumer, "task_consumer", None)
            return [queue.name for queue in consumer.queues] if consumer else []

        autoscaler = getattr(worker, "autoscaler", None)

        def slots() -> int:
            """Those there may soon be: what is cut on demand waits for a free slot to be on
            offer.
            """
            if not worker.pool.active:
                return 0
            return getattr(autoscaler, "reach", None) or worker.pool.num_processes or 1

        def exit_code(pid: int) -> int | None:
            processes = getattr(getattr(worker.pool, "_pool", None), "_pool", None) or ()
            found = next((each._popen for each in list(processes) if each.pid == pid), None)
            return found.returncode if found is not None else None

        def stir() -> None:
            if (hub := getattr(worker, "hub", None)) is not None:
                hub.call_soon(int)

        guard = Supervisor(
            runtime=worker.app.rlm_runtime(),
            celery=worker.app.conf,
            pool_size=slots,
            queues=queues,
            exit_code=exit_code,
            stir=stir,
        )
        worker.app.rlm_supervisor = guard
        guard.start()
        signals.worker_shutdown.connect(lambda **_: guard.stop(), weak=False)
        monitor = monitor_thread(
            worker.app, worker.app.rlm_runtime(), slots if autoscaler else None, queues
        )
        worker.app.rlm_monitor = monitor
        if autoscaler:
            worker.app.rlm_queued = lambda: monitor.queued
        monitor.start()
        signals.worker_shutdown.connect(lambda **_: monitor.stop(), weak=False)
        if (checks := self._checks) is not None:
            checks.start()
            signals.worker_shutdown.connect(lambda **_: checks.stop(), weak=False)

    def stop(self, worker: Any) -> None:
        """Let running nodes cut; the pool is asked to stop after this."""
        drain(worker.app)

    def terminate(self, worker: Any) -> None:
        """Let nobody cling to life: a cold shutdown ends pool processes by signal."""
        worker.app.rlm_runtime().page.terminating = True
        drain(worker.app)


class HealthStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Count what the pool does, and answer for the worker on its port, until the pool has ended."""

    requires = {SupervisorStep}

    def __init__(self, worker: Any, metrics_port: int | None = None, **options: Any) -> None:
        super().__init__(worker, **options)
        self._port = metrics_port or 0
        self.enabled = self._port > 0

    def create(self, worker: Any) -> Any:
        """Make the folder that pool processes are to find."""
        from rlm_tasks.telemetry.worker_port import WorkerPort  # clients need no server

        return WorkerPort(worker, self._port)

    def start(self, worker: Any) -> None:
        """Open the port once the pool has forked."""
        self.obj.start()
        signals.worker_shutdown.connect(lambda **_: self.obj.stop(), weak=False)

    def stop(self, worker: Any) -> None:
        """Go on: a worker that waits for its last items is alive."""

    def terminate(self, worker: Any) -> None:
        """Wait for nobody; Celery does not tell of the end of a cold shutdown."""
        self.obj.stop()


def drain(app: Any) -> None:
    """Make running nodes cut at their next slice."""
    app.rlm_runtime().page.draining = True
    if (guard := getattr(app, "rlm_supervisor", None)) is not None:
        guard.wake()


def drain_when_told_to_stop(app: Any) -> None:
    """Drain as soon as the main process gets its signal, and let one to the whole group mean the
    same.

    docker, systemd and Kubernetes may signal every process of the group; a stock pool process dies
    of it in the middle of an item."""
    page, clock = app.rlm_runtime().page, app.rlm_runtime().clock

    def on_sigterm(*_: Any) -> None:
        mine, until = app.rlm_runtime().page_entry(), clock() + GROUP_SIGNAL_S
        while not (page.draining or mine.doomed) and clock() < until:
            time.sleep(0.01)
        if page.terminating or mine.doomed or not page.draining:
            # Meant for this process alone: revoke(terminate=True), a time limit, a cold shutdown.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signals.worker_shutting_down.connect(lambda **_: drain(app), weak=False)
    handle_sigterm(on_sigterm)
