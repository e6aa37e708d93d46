"""The policies of executors, and the turns by which no more of them run at once than allowed.

`AdaptiveResourceManager` uses both.  Begin with `Turns.turn`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from resilience.errors import BulkheadFull
from scheduler.allocation import (
    ExecutorPriority,
    ResourceAllocationPolicy,
    ResourceLimits,
    read_policies,
)

PRIORITIES = {
    "D3-Q3": ExecutorPriority.CRITICAL,  # traceability
    "D4-Q2": ExecutorPriority.CRITICAL,  # causal chains
    "D3-Q2": ExecutorPriority.HIGH,
    "D4-Q1": ExecutorPriority.HIGH,
    "D2-Q3": ExecutorPriority.HIGH,
}
"""The priorities of executors that have no policy, as other orchestrators have them."""
_ANY_MB = 1.0
"""The memory of an executor without a policy: so small that memory does not bound it."""
_ASK_AGAIN_S = 1.0
"""The time after which a denied caller may ask again, in seconds."""


class ExecutorPolicies:
    """The policy of each executor: registered, else in the file, else by its known priority."""

    def __init__(self, path: str = "") -> None:
        """`path` is the file of RLM_ALLOCATION__POLICIES, '' for none.  Raises InvalidValue."""
        self._own = {each.executor_id: each for each in read_policies(path)} if path else {}

    def register(self, policy: ResourceAllocationPolicy) -> None:
        """Use a policy from now on."""
        self._own[policy.executor_id] = policy

    def of(self, executor_id: str, limits: ResourceLimits) -> ResourceAllocationPolicy:
        """Return the policy of an executor; without one, the limits bound its workers."""
        return self._own.get(executor_id) or ResourceAllocationPolicy(
            executor_id=executor_id,
            priority=PRIORITIES.get(executor_id, ExecutorPriority.NORMAL),
            min_memory_mb=_ANY_MB,
            max_memory_mb=_ANY_MB,
            min_workers=limits.min_workers,
            max_workers=limits.max_workers,
        )


class Turns:
    """The executions of one process: as many of each executor run at once as its budget allows.

    The first to wait is the first to run.  A change of the budget acts when the next one ends.
    """

    def __init__(self, budget: Callable[[str], int]) -> None:
        """`budget` returns the number of an executor's runs allowed at once, at least 1."""
        self._budget, self._lock = budget, threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[Callable[[], object]]] = defaultdict(deque)

    def running(self) -> list[str]:
        """Return the executors that run now, sorted."""
        return sorted(+self._running)

    def total(self) -> int:
        """Return the number of executions that run now."""
        return self._running.total()

    @contextmanager
    def turn(self, executor_id: str) -> Generator[None, None, None]:
        """Run a block in its turn.

        Raises BulkheadFull instead of a wait in a thread that runs an event loop.
        """
        granted = threading.Event()
        may_wait = not _in_event_loop()
        if not self._take(executor_id, granted.set if may_wait else None):
            if not may_wait:
                raise BulkheadFull(
                    executor_id,
                    _ASK_AGAIN_S,
                    "its worker budget is used up; to wait in an event loop, call "
                    "execute_with_resource_management",
                )
            granted.wait()
        try:
            yield
        finally:
            self._give_back(executor_id)

    @asynccontextmanager
    async def turn_async(self, executor_id: str) -> AsyncGenerator[None, None]:
        """Run a block in its turn, for which a coroutine waits."""
        loop, granted = asyncio.get_running_loop(), asyncio.Event()

        def grant() -> None:
            loop.call_soon_threadsafe(granted.set)

        if not self._take(executor_id, grant):
            try:
                await granted.wait()
            except asyncio.CancelledError:
                self._withdraw(executor_id, grant)
                raise
        try:
            yield
        finally:
            self._give_back(executor_id)

    def _take(self, executor_id: str, grant: Callable[[], object] | None) -> bool:
        """Start a run and return True; else let `grant` be called when its turn has come."""
        # A budget is at least 1, so the first run needs not ask for it.
        budget = self._budget(executor_id) if self._running[executor_id] else 1
        with self._lock:
            if self._running[executor_id] < budget:
                self._running[executor_id] += 1
                return True
            if grant is not None:
                self._waiting[executor_id].append(grant)
            return False

    def _give_back(self, executor_id: str) -> None:
        budget = self._budget(executor_id) if self._waiting[executor_id] else 1
        with self._lock:
            self._running[executor_id] -= 1
            waiting = self._waiting[executor_id]
            while waiting and self._running[executor_id] < budget:
                self._running[executor_id] += 1
                waiting.popleft()()

    def _withdraw(self, executor_id: str, grant: Callable[[], object]) -> None:
        """Let a cancelled coroutine leave its place, or the turn that it has got meanwhile."""
        with self._lock:
            waits = grant in self._waiting[executor_id]
            if waits:
                self._waiting[executor_id].remove(grant)
        if not waits:
            self._give_back(executor_id)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
