"""The boot steps that Celery starts and stops with a worker.

`installation` adds them to the app by name.  Begin with `SupervisorStep.start`.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import bootsteps, signals

from rlm_tasks.worker.supervisor import Supervisor
from rlm_tasks.worker.upstream import handle_sigterm

GROUP_SIGNAL_S = 0.5
"""Within this time a SIGTERM to the process group reaches the main process, too."""


class SupervisorStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Runs the supervisor and the monitor, and drains before the pool stops for any reason."""

    requires = {"celery.worker.components:Pool"}

    def create(self, worker: Any) -> None:
        """Import modules that pool processes share."""
        from rlm_tasks.llm.endpoint_checks import checks_of

        self._checks = checks_of(worker.app.rlm_runtime())

    def start(self, worker: Any) -> None:
        """Start the threads, once the pool has forked."""
        pool = PoolFacts(worker)
        supervisor = Supervisor(
            runtime=worker.app.rlm_runtime(),
            celery=worker.app.conf,
            pool_size=pool.slots,
            queues=pool.queues,
            exit_code=pool.exit_code,
            wake_loop=pool.wake_loop,
        )
        worker.app.rlm_supervisor = supervisor
        _run_until_shutdown(supervisor)
        self._start_monitor(worker, pool)
        if self._checks is not None:
            _run_until_shutdown(self._checks)

    def _start_monitor(self, worker: Any, pool: PoolFacts) -> None:
        """Start the monitor; with an autoscaler it also counts waiting messages."""
        # Clients need no alerts and webhooks, so they do not import them.
        from rlm_tasks.worker.monitor_thread import monitor_thread

        slots = pool.slots if pool.autoscaler else None
        monitor = monitor_thread(worker.app, worker.app.rlm_runtime(), slots, pool.queues)
        worker.app.rlm_monitor = monitor
        if pool.autoscaler:
            worker.app.rlm_queued = lambda: monitor.queued
        _run_until_shutdown(monitor)

    def stop(self, worker: Any) -> None:
        """Make running nodes cut; Celery stops the pool after this."""
        drain(worker.app)

    def terminate(self, worker: Any) -> None:
        """Drain for a cold shutdown, which ends pool processes by signal."""
        worker.app.rlm_runtime().page.terminating = True
        drain(worker.app)


class PoolFacts:
    """The current facts of a worker's pool and consumer, read from Celery's objects."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.autoscaler = getattr(worker, "autoscaler", None)

    def queues(self) -> list[str]:
        """Return the queues that the worker consumes now; none while its broker is away."""
        connection = getattr(self._worker.consumer, "connection", None)
        consumer = getattr(self._worker.consumer, "task_consumer", None)
        if not (consumer and connection and connection.connected):
            return []
        return [queue.name for queue in consumer.queues]

    def slots(self) -> int:
        """Return the number of slots that the pool has or may have soon; 0 while it stops.

        A pool that may grow offers slots that it does not have yet: nodes cut only for offered
        slots.
        """
        pool = self._worker.pool
        if not pool.active:
            return 0
        return getattr(self.autoscaler, "reach", None) or pool.num_processes or 1

    def exit_code(self, pid: int) -> int | None:
        """Return the exit code of a pool process that billiard has reaped, None otherwise."""
        processes = getattr(getattr(self._worker.pool, "_pool", None), "_pool", None) or ()
        found = next((each._popen for each in list(processes) if each.pid == pid), None)
        return found.returncode if found is not None else None

    def wake_loop(self) -> None:
        """Make the event loop of the main process go round, if there is one."""
        if (hub := getattr(self._worker, "hub", None)) is not None:
            hub.call_soon(int)


def _run_until_shutdown(thread: Any) -> None:
    """Start a thread, and stop it when the worker shuts down."""
    thread.start()
    signals.worker_shutdown.connect(lambda **_: thread.stop(), weak=False)


class HealthStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Counts the work of the pool, and serves the worker's port until the pool has ended."""

    requires = {SupervisorStep}

    def __init__(self, worker: Any, metrics_port: int | None = None, **options: Any) -> None:
        super().__init__(worker, **options)
        self._port = metrics_port or 0
        self.enabled = self._port > 0

    def create(self, worker: Any) -> Any:
        """Make the folder of the metrics files, which pool processes must find."""
        from rlm_tasks.telemetry.worker_port import WorkerPort  # clients do not need a server

        return WorkerPort(worker, self._port)

    def start(self, worker: Any) -> None:
        """Open the port once the pool has forked."""
        self.obj.start()
        signals.worker_shutdown.connect(lambda **_: self.obj.stop(), weak=False)

    def stop(self, worker: Any) -> None:
        """Keep the port open: a worker that waits for its last items is alive."""

    def terminate(self, worker: Any) -> None:
        """Close the port at once: Celery does not report the end of a cold shutdown."""
        self.obj.stop()


def drain(app: Any) -> None:
    """Make running nodes cut at their next slice."""
    app.rlm_runtime().page.draining = True
    if (supervisor := getattr(app, "rlm_supervisor", None)) is not None:
        supervisor.wake()


def drain_on_sigterm(app: Any) -> None:
    """Drain as soon as SIGTERM reaches the main process, or all processes of its group.

    docker, systemd and Kubernetes may signal every process of the group.  Without this handler, a
    pool process dies of it in the middle of an item.
    """
    page, clock = app.rlm_runtime().page, app.rlm_runtime().clock

    def on_sigterm(*_: Any) -> None:
        mine, until = app.rlm_runtime().page_entry(), clock() + GROUP_SIGNAL_S
        while not (page.draining or mine.doomed) and clock() < until:
            time.sleep(0.01)
        if page.terminating or mine.doomed or not page.draining:
            # The signal ends this process: revoke(terminate=True), a time limit, a cold shutdown.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signals.worker_shutting_down.connect(lambda **_: drain(app), weak=False)
    handle_sigterm(on_sigterm)
