"""What a worker's main process does for its pool: leases, lost nodes, free slots, the sweep, the drain.

Decides when a lease is beaten, when a node is given back, and which slots are on offer.  Pool processes never
beat, so an item that holds the interpreter for minutes runs once.  Refuses to know what nodes compute.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery import bootsteps, signals
from celery.worker import state
from celery.worker.request import Request
from redis.exceptions import RedisError

from resilience.errors import StoreUnavailable
from resilience.store import Call
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import NO_ITEM, Held
from rlm_tasks.messaging.dispatch import NODE_TASK
from rlm_tasks.worker.host import Host
from rlm_tasks.worker.preflight import dangers
from rlm_tasks.worker.upstream import handle_sigterm
from scheduler.preemption import rank_of
from scheduler.queues import priority_of

logger = logging.getLogger(__name__)

SETTLE_S = 0.005
"""A slot that stays free this long is on offer; between two small nodes it is free for less."""
REFRESH_S = 1.0
"""How often the guard looks by itself.  It otherwise wakes on events: ticking every 10 ms slowed computing
pool processes on two busy cores by 7 % (measured)."""
BACK_OFF_S = 1.0
GROUP_SIGNAL_S = 0.5
"""A SIGTERM to the process group has reached the main process, too, within this time."""
REAPED = "a cause unknown"
REAPED_S = 2.0
"""Celery has told what a process died of within this time of having reaped it."""
DEAF_S, DEAF_SHARE = 1.0, 0.05
"""An item past its limit has this long to hear its alarm (the greater of both) before its process is killed."""
_UNREACHABLE = (RedisError, StoreUnavailable, OSError)


class Guard(threading.Thread):
    """The thread of a worker's main process that speaks to the ledger.

    It lives as long as the pool: through reconnections of the consumer, and while a worker that was told to
    stop waits for its last items.
    """

    def __init__(
        self,
        runtime: Runtime,
        celery: Mapping[str, Any],
        pool_size: Callable[[], int],
        queues: Callable[[], list[str]],
        exit_code: Callable[[int], int | None] = lambda _pid: None,
        stir: Callable[[], object] = lambda: None,
    ) -> None:
        """`stir` has the event loop go round: by itself it sees only within a second that the worker was told to stop."""
        super().__init__(name="rlm-guard", daemon=True)
        self._runtime, self._celery, self._pool_size, self.queues = runtime, celery, pool_size, queues
        self._exit_code, self._stir = exit_code, stir
        self._ledger = runtime.ledger.hasty()  # an outage is seen at once, and what was missed is done after it
        self._warned = False
        self._reaped: dict[int, float] = {}
        self._sweep_not_before = 0.0
        self._stopping = False
        self._woken: SimpleQueue[None] = SimpleQueue()  # an Event would lock up when a signal's handler wakes it during a wake
        self._offered: tuple[int, int] | None = None
        self._due = {"measure": 0.0, "offer": 0.0, "look": 0.0, "beat": 0.0, "sweep": 0.0}
        self.host = Host(runtime, pool_size, queues)
        self._lost = False
        self.ticked_at = self.answered_at = time.monotonic()  # when it last went round, and last heard of the ledger
        self._left: list[str] = []  # queues that are not consumed while it drains
        self._told = 0  # ranks that somebody has asked room for since the latest look began

    def run(self) -> None:
        """Tick on each event, when a job is due, and once a second until stopped."""
        while not self._stopping:
            with suppress(Empty):
                self._woken.get(timeout=self._sleep_s())
                time.sleep(SETTLE_S)
                while True:  # whoever else has woken it meanwhile
                    self._woken.get_nowait()
            try:
                if self._runtime.page.draining:
                    self._stir()
                self._tick(time.monotonic())
                self._lost, self.answered_at = False, time.monotonic()
            except _UNREACHABLE as error:
                if not self._lost:
                    logger.warning("The ledger does not answer: %s", error)
                self._lost, self._offered, self._due["beat"] = True, None, 0.0
            except Exception:
                logger.exception("The guard met something unexpected, and goes on")
            self.ticked_at = time.monotonic()

    def wake(self) -> None:
        """Say that a slot became free or busy, or that the worker drains."""
        self._woken.put(None)

    def begin(self) -> None:
        """Offer slots for the queues that are consumed from now on, rather than a second later."""
        self._offered = None
        self.wake()

    def drain(self, queues: list[str]) -> None:
        """Have running nodes hand over, and offer no slot, until `resume`; these queues are no longer consumed."""
        self._left += [queue for queue in queues if queue not in self._left]
        self._runtime.page.draining = True
        self.wake()

    def resume(self) -> list[str]:
        """Offer slots again; return the queues that are to be consumed again."""
        left, self._left = self._left, []
        if left:
            self._runtime.page.draining = False
            self.wake()
        return left

    def make_room(self, queue: str) -> bool:
        """Have running nodes ask whether they are to yield to what waits in a queue; False: not served here."""
        if queue not in self.queues():
            return False
        self._told |= rank_of(priority_of(queue))
        self._runtime.page.urgent |= rank_of(priority_of(queue))
        self._runtime.page.recall()
        return True

    def _sleep_s(self) -> float:
        return min(REFRESH_S, max(0.0, min(self._due.values()) - time.monotonic())) if not self._lost else BACK_OFF_S

    def stop(self) -> None:
        """End the thread and take this worker's slots off the board."""
        self._stopping = True
        self._woken.put(None)
        self.join(timeout=5)
        try:
            self._runtime.slots.withdraw(self._runtime.worker)
            self._runtime.board.withdraw(self._runtime.worker)
        except _UNREACHABLE as error:
            logger.info("Slots were not withdrawn, they expire: %s", error)

    def _tick(self, now: float) -> None:
        ledger = self._runtime.settings.ledger
        if measured := now >= self._due["measure"]:
            self._due["measure"] = now + REFRESH_S
            self.host.measure(now)
        if self._lost:
            # Leases ran out while nobody could beat; give every worker the time to renew its own.
            self._sweep_not_before = now + ledger.lease_s / 3
        if not self._warned:
            self._warn()
        self._offer(now)
        if measured:
            self._exchange(now)
        if now >= self._due["look"]:
            self._due["look"] = now + REFRESH_S
            self._reap(now)
            self._kill_overdue(now)
        if now >= self._due["beat"]:
            self._due["beat"] = now + ledger.lease_s / 3
            self._ledger.beat([(held.job, held.node, held.token) for held in self._runtime.page.held()])
        if now >= self._due["sweep"]:
            self._due["sweep"] = now + ledger.sweep_s
            self._sweep()
            self._look_ahead(*self._ledger.store.run(self._ledger.next_look()))

    def _warn(self) -> None:
        for danger in dangers(self._ledger.store, self._runtime.settings, self._celery):
            logger.warning("%s", danger)
        self._warned = True

    def _offer(self, now: float) -> None:
        """Publish this worker's slots, and learn in the same round trip when the next job is due."""
        total = 0 if self._runtime.page.draining else self._pool_size()
        free = max(0, total - len(state.reserved_requests))
        if (total, free) != self._offered or now >= self._due["offer"]:
            offer = self._runtime.slots.publish(self._runtime.worker, total, free, self.queues())
            _, next_ms = self._ledger.store.run(offer, self._ledger.next_look())
            self._look_ahead(next_ms)
            self._runtime.page.hungry = free > 0
            self._offered, self._due["offer"] = (total, free), now + REFRESH_S

    def _exchange(self, now: float) -> None:
        """Tell of this host, and hear what to act on and who waits; once a second, for slots become free more often."""
        self._told, exchange = 0, self.host.exchange()
        answers = self._ledger.store.run(*exchange, *self._tokens())
        self.host.heard(answers[: len(exchange)], now)
        self._see_urgent(answers[len(exchange) :])

    def _tokens(self) -> list[Call]:
        return [self._runtime.preemption.open(queue) for queue in self.queues() if rank_of(priority_of(queue))]

    def _see_urgent(self, tokens: Sequence[int]) -> None:
        """Know of urgent work also when nobody has told, and forget what is done; what was told meanwhile is news."""
        served = [rank_of(priority_of(queue)) for queue in self.queues() if rank_of(priority_of(queue))]
        urgent = sum(rank for rank, waiting in zip(served, tokens, strict=False) if waiting)
        if urgent & ~self._runtime.page.urgent:
            self._runtime.page.recall()
        self._runtime.page.urgent = urgent
        if self._told:
            self._runtime.page.urgent |= self._told

    def _look_ahead(self, next_ms: int) -> None:
        """Wake when the first job is due: parked nodes wait for a time, not for a tick."""
        if next_ms >= 0:
            next_look = min(self._due["sweep"], time.monotonic() + next_ms / 1000)
            self._due["sweep"] = max(self._sweep_not_before, next_look)

    def _reap(self, now: float) -> None:
        """Redo the nodes of dead pool processes at once: Celery may need 5 s to notice."""
        for held in self._runtime.page.held():
            died_of = cause_of_death(held.pid) if held.pid != os.getpid() else ""
            if died_of == REAPED:
                died_of = self._reaped_by_pool(held.pid)
            if died_of == REAPED and now - self._reaped.setdefault(held.pid, now) < REAPED_S:
                continue  # Celery has noticed, and will say what it died of
            if died_of:
                about = {"job": held.job, "node": held.node}
                logger.warning(
                    "Pool process %d died of %s; node %s of job %s is given to another",
                    held.pid, died_of, held.node, held.job, extra=about,
                )  # fmt: skip
                self._reaped.pop(held.pid, None)
                if give_back(self._runtime, held, died_of):
                    self._runtime.resend(held.job, [held.node])

    def _reaped_by_pool(self, pid: int) -> str:
        """Return what a process died of that was reaped on the way, when another was started: Celery may not notice for 5 s."""
        code = self._exit_code(pid)
        return REAPED if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _sweep(self) -> None:
        for job in self._ledger.take_due():
            more = True
            while more:
                swept = self._ledger.sweep(job)
                more = swept.more
                if swept.send:
                    logger.info("Job %s: %d overdue nodes are sent again", job, len(swept.send))
                    self._runtime.resend(job, swept.send)

    def _kill_overdue(self, now: float) -> None:
        """Replace a process whose item does not hear its alarm: it does not return to Python."""
        for held in self._runtime.page.held():
            if not held.limit_s or held.item == NO_ITEM or held.pid == os.getpid():
                continue
            if now - held.since > held.limit_s + max(DEAF_S, DEAF_SHARE * held.limit_s):
                logger.error("An item of job %s ran longer than %g s; its process is killed", held.job, held.limit_s)
                given_back = give_back(self._runtime, held, f"its item limit of {held.limit_s:g} s", condemned=True)
                os.kill(held.pid, signal.SIGKILL)
                if given_back:
                    self._runtime.resend(held.job, [held.node])


def give_back(runtime: Runtime, held: Held, died_of: str, *, condemned: bool = False) -> bool:
    """RELEASE a node whose process is gone or about to go; say whether it now waits for a message.

    Its next claim knows the item that was in flight; a `condemned` one is not run again.  While Redis is away
    the page still tells of it, and the guard comes back to it.
    """
    try:
        waits = runtime.ledger.hasty().release(held.job, held.node, held.token, held.item, died_of, condemned=condemned)
    except _UNREACHABLE as error:
        logger.warning("Node %s of job %s is not given back yet: %s", held.node, held.job, error)
        return False
    runtime.page.forget(held.pid)
    if died_of:
        runtime.guards.forget(held.pid)
        runtime.shares.forget(held.pid)
    return waits


def cause_of_death(pid: int) -> str:
    """Return what a pool process died of, '' while it lives; it is left for billiard to reap."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return REAPED
    if found is None:
        return ""
    if found.si_code == os.CLD_EXITED:
        return f"exit code {found.si_status}"
    return signal.Signals(found.si_status).name


class GuardStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Run the guard, and drain before the pool is asked to stop: by signal, remote control or error alike."""

    requires = {"celery.worker.components:Pool"}

    def create(self, worker: Any) -> None:
        """Import what pool processes are to share."""
        from rlm_tasks.llm.endpoint_checks import checks_of

        self._checks = checks_of(worker.app.rlm_runtime())

    def start(self, worker: Any) -> None:
        """Start once the pool has forked."""
        from rlm_tasks.worker.monitor_thread import monitor_thread  # alerts and webhooks are of no use to clients

        def queues() -> list[str]:
            consumer = getattr(worker.consumer, "task_consumer", None)
            return [queue.name for queue in consumer.queues] if consumer else []

        autoscaler = getattr(worker, "autoscaler", None)

        def slots() -> int:
            """Those there may soon be: what is cut on demand waits for a free slot to be on offer."""
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

        guard = Guard(worker.app.rlm_runtime(), worker.app.conf, slots, queues, exit_code, stir)
        worker.app.rlm_guard = guard
        guard.start()
        signals.worker_shutdown.connect(lambda **_: guard.stop(), weak=False)
        monitor = monitor_thread(worker.app, worker.app.rlm_runtime(), slots if autoscaler else None, queues)
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

    requires = {GuardStep}

    def __init__(self, worker: Any, metrics_port: int | None = None, **options: Any) -> None:
        super().__init__(worker, **options)
        self._port = metrics_port or 0
        self.enabled = self._port > 0

    def create(self, worker: Any) -> Any:
        """Make the folder that pool processes are to find."""
        from rlm_tasks.telemetry.worker_port import Station  # a server is of no use to clients

        return Station(worker, self._port)

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
    if (guard := getattr(app, "rlm_guard", None)) is not None:
        guard.wake()


def drain_when_told_to_stop(app: Any) -> None:
    """Drain as soon as the main process gets its signal, and let one to the whole group mean the same.

    docker, systemd and Kubernetes may signal every process of the group; a stock pool process dies of it in the
    middle of an item.
    """
    page = app.rlm_runtime().page

    def on_sigterm(*_: Any) -> None:
        mine, until = app.rlm_runtime().page_slot(), time.monotonic() + GROUP_SIGNAL_S
        while not (page.draining or mine.doomed) and time.monotonic() < until:
            time.sleep(0.01)
        if page.terminating or mine.doomed or not page.draining:
            # Meant for this process alone: revoke(terminate=True), a time limit, a cold shutdown.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signals.worker_shutting_down.connect(lambda **_: drain(app), weak=False)
    handle_sigterm(on_sigterm)


class NodeRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """A node's message in the main process, which knows at once when its pool process is free, or gone."""

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A slot is busy."""
        super().on_accepted(pid, time_accepted)
        self._wake_guard()

    def acknowledge(self) -> None:
        """A slot is free: nodes are acknowledged when they end."""
        super().acknowledge()
        self._wake_guard()

    def _wake_guard(self) -> None:
        guard: Guard | None = getattr(self._app, "rlm_guard", None)
        if guard is not None:
            guard.wake()

    def on_failure(self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Give the node back when its process was lost; the message is requeued by Celery."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError | SystemExit):
            named = re.search(r"SIG[A-Z0-9]+", str(error))
            self._give_back(named[0] if named else REAPED)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fail the item that ran into Celery's hard time limit, and redo the rest of its node.

        Celery notices a lost process within 5 s, so the limit may strike first; that is a death like others.
        """
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        died_of = cause_of_death(self.worker_pid) if self.worker_pid else ""
        self._give_back(died_of or f"the hard time limit of {timeout:g} s", condemned=not died_of)
        self.reject(requeue=True)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Let the pool process know that the signal is meant for it, and not for its group."""
        if self.worker_pid:
            self._runtime.page.doom(self.worker_pid)
        super().terminate(pool, signal)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """A revoked node cancels its job: the chord hears nothing, the ledger everything."""
        state.task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self.acknowledge()
        self._already_revoked = True
        self._give_back("")
        if self.name == NODE_TASK:
            try:
                self._runtime.ledger.hasty().stop(self._job, "cancelled", detail=f"a node's task was {reason}")
            except _UNREACHABLE as error:
                logger.warning("Job %s was not cancelled: %s", self._job, error)

    @property
    def _runtime(self) -> Runtime:
        return self._app.rlm_runtime()  # type: ignore[no-any-return]  # set by install

    @property
    def _job(self) -> str:
        return str(self._args[0] if self._args else self._payload[0][0])

    def _give_back(self, died_of: str, *, condemned: bool = False) -> None:
        for held in self._runtime.page.held():
            if held.pid == self.worker_pid and held.job == self._job:
                give_back(self._runtime, held, died_of, condemned=condemned)
