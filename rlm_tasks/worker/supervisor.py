"""What a worker's main process does for its pool: leases, lost nodes, free slots, the sweep, the
drain.

Decides when a lease is beaten, when a node is given back, and which slots are on offer.  Pool
processes never beat, so an item that holds the interpreter for minutes runs once.  Refuses to know
what nodes compute."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from celery.worker import state

from resilience.store import Call
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import NO_ITEM
from rlm_tasks.ledger.records import SWEEP_AT_ONCE
from rlm_tasks.worker.host import Host
from rlm_tasks.worker.lost_nodes import _UNREACHABLE, REAPED, cause_of_death, give_back
from rlm_tasks.worker.preflight import dangers
from scheduler.preemption import rank_of
from scheduler.queues import priority_of

logger = logging.getLogger(__name__)

SETTLE_S = 0.005
"""A slot that stays free this long is on offer; between two small nodes it is free for less."""
REFRESH_S = 1.0
"""How often the guard looks by itself.  It otherwise wakes on events: ticking every 10 ms slowed
computing pool processes on two busy cores by 7 % (measured)."""
BACK_OFF_S = 1.0
REAPED_S = 2.0
"""Celery has told what a process died of within this time of having reaped it."""
DEAF_S, DEAF_SHARE = 1.0, 0.05
"""An item past its limit has this long to hear its alarm (the greater of both) before its process
is killed.
"""


class Supervisor(threading.Thread):
    """The thread of a worker's main process that speaks to the ledger.

    It lives as long as the pool: through reconnections of the consumer, and while a worker that was
    told to stop waits for its last items."""

    def __init__(
        self,
        runtime: Runtime,
        celery: Mapping[str, Any],
        pool_size: Callable[[], int],
        queues: Callable[[], list[str]],
        exit_code: Callable[[int], int | None] = lambda _pid: None,
        stir: Callable[[], object] = lambda: None,
    ) -> None:
        """`stir` has the event loop go round: by itself it sees only within a second that the
        worker was told to stop.
        """
        super().__init__(name="rlm-supervisor", daemon=True)
        self._clock = runtime.clock
        self._runtime, self._celery, self._pool_size, self.queues = (
            runtime,
            celery,
            pool_size,
            queues,
        )
        self._exit_code, self._stir = exit_code, stir
        self._ledger = (
            runtime.ledger.fail_fast()
        )  # an outage is seen at once, and what was missed is done after it
        self._warned = False
        self._reaped: dict[int, float] = {}
        self._sweep_not_before = 0.0
        self._stopping = False
        self._woken: SimpleQueue[None] = (
            SimpleQueue()
        )  # an Event would lock up when a signal's handler wakes it during a wake
        self._offered: tuple[int, int] | None = None
        self._due = {"measure": 0.0, "offer": 0.0, "look": 0.0, "beat": 0.0, "sweep": 0.0}
        self.host = Host(runtime, pool_size, queues)
        self._lost = False
        self.ticked_at = self.answered_at = (
            self._clock()
        )  # when it last went round, and last heard of the ledger
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
                self._tick(self._clock())
                self._lost, self.answered_at = False, self._clock()
            except _UNREACHABLE as error:
                if not self._lost:
                    logger.warning("The ledger does not answer: %s", error)
                self._lost, self._offered, self._due["beat"] = True, None, 0.0
            except Exception:
                logger.exception("The guard met something unexpected, and goes on")
            self.ticked_at = self._clock()

    def wake(self) -> None:
        """Say that a slot became free or busy, or that the worker drains."""
        self._woken.put(None)

    def begin(self) -> None:
        """Offer slots for the queues that are consumed from now on, rather than a second later."""
        self._offered = None
        self.wake()

    def drain(self, queues: list[str]) -> None:
        """Have running nodes hand over, and offer no slot, until `resume`; these queues are no
        longer consumed.
        """
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
        """Have running nodes ask whether they are to yield to what waits in a queue; False: not
        served here.
        """
        if queue not in self.queues():
            return False
        self._told |= rank_of(priority_of(queue))
        self._runtime.page.urgent |= rank_of(priority_of(queue))
        self._runtime.page.recall()
        return True

    def _sleep_s(self) -> float:
        return (
            min(REFRESH_S, max(0.0, min(self._due.values()) - self._clock()))
            if not self._lost
            else BACK_OFF_S
        )

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
            self._ledger.beat(
                [(held.job, held.node, held.token) for held in self._runtime.page.held()]
            )
        if now >= self._due["sweep"]:
            self._due["sweep"] = now + ledger.sweep_s
            self._sweep()
            self._look_ahead(*self._ledger.store.call(self._ledger.due.first()))

    def _warn(self) -> None:
        for danger in dangers(self._ledger.store, self._runtime.settings, self._celery):
            logger.warning("%s", danger)
        self._warned = True

    def _offer(self, now: float) -> None:
        """Publish this worker's slots, and learn in the same round trip when the next job is
        due.
        """
        total = 0 if self._runtime.page.draining else self._pool_size()
        free = max(0, total - len(state.reserved_requests))
        if (total, free) != self._offered or now >= self._due["offer"]:
            offer = self._runtime.slots.publish(self._runtime.worker, total, free, self.queues())
            _, next_ms = self._ledger.store.call(offer, self._ledger.due.first())
            self._look_ahead(next_ms)
            self._runtime.page.hungry = free > 0
            self._offered, self._due["offer"] = (total, free), now + REFRESH_S

    def _exchange(self, now: float) -> None:
        """Tell of this host, and hear what to act on and who waits; once a second, for slots become
        free more often.
        """
        self._told, exchange = 0, self.host.exchange()
        answers = self._ledger.store.call(*exchange, *self._tokens())
        self.host.heard(answers[: len(exchange)], now)
        self._see_urgent(answers[len(exchange) :])

    def _tokens(self) -> list[Call]:
        return [
            self._runtime.preemption.open(queue)
            for queue in self.queues()
            if rank_of(priority_of(queue))
        ]

    def _see_urgent(self, tokens: Sequence[int]) -> None:
        """Know of urgent work also when nobody has told, and forget what is done; what was told
        meanwhile is news.
        """
        served = [
            rank_of(priority_of(queue)) for queue in self.queues() if rank_of(priority_of(queue))
        ]
        urgent = sum(rank for rank, waiting in zip(served, tokens, strict=False) if waiting)
        if urgent & ~self._runtime.page.urgent:
            self._runtime.page.recall()
        self._runtime.page.urgent = urgent
        if self._told:
            self._runtime.page.urgent |= self._told

    def _look_ahead(self, next_ms: int) -> None:
        """Wake when the first job is due: parked nodes wait for a time, not for a tick."""
        if next_ms >= 0:
            next_look = min(self._due["sweep"], self._clock() + next_ms / 1000)
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
                    held.pid,
                    died_of,
                    held.node,
                    held.job,
                    extra=about,
                )
                self._reaped.pop(held.pid, None)
                if give_back(self._runtime, held, died_of):
                    self._runtime.delivery.resend(held.job, [held.node])

    def _reaped_by_pool(self, pid: int) -> str:
        """Return what a process died of that was reaped on the way, when another was started:
        Celery may not notice for 5 s.
        """
        code = self._exit_code(pid)
        return (
            REAPED
            if code is None
            else signal.Signals(-code).name
            if code < 0
            else f"exit code {code}"
        )

    def _sweep(self) -> None:
        sweep_ms = int(self._runtime.settings.ledger.sweep_s * 1000)
        for job in self._ledger.due.take(SWEEP_AT_ONCE, sweep_ms):
            more = True
            while more:
                swept = self._ledger.sweep(job)
                more = swept.more
                if swept.send:
                    logger.info("Job %s: %d overdue nodes are sent again", job, len(swept.send))
                    self._runtime.delivery.resend(job, swept.send)

    def _kill_overdue(self, now: float) -> None:
        """Replace a process whose item does not hear its alarm: it does not return to Python."""
        for held in self._runtime.page.held():
            if not held.limit_s or held.item == NO_ITEM or held.pid == os.getpid():
                continue
            if now - held.since > held.limit_s + max(DEAF_S, DEAF_SHARE * held.limit_s):
                logger.error(
                    "An item of job %s ran longer than %g s; its process is killed",
                    held.job,
                    held.limit_s,
                )
                given_back = give_back(
                    self._runtime, held, f"its item limit of {held.limit_s:g} s", condemned=True
                )
                os.kill(held.pid, signal.SIGKILL)
                if given_back:
                    self._runtime.delivery.resend(held.job, [held.node])
