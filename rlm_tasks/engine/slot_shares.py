"""The number of nodes of one operation that may run at once, over all workers: its slot share.

`NodeRun` asks it before it begins.  The policy is the operator's file's, otherwise the operation's
own.  Without a policy, and below high pressure, a node needs no round trip for its share.
`scheduler.allocation` computes the size of a share.
"""

from __future__ import annotations

import os

from resilience.bulkhead import LEASE_S, Bulkhead, Wake
from resilience.degradation import Level
from resilience.store import Store
from rlm_tasks.engine.shared_page import SharedPage
from rlm_tasks.jobs.splitting import LONGEST_RUN
from rlm_tasks.operations import registry
from rlm_tasks.operations.policies import policies, policy_of
from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from scheduler.allocation import may_start, workers_for
from scheduler.sampling import held_mb


class SlotShares:
    """The slot shares of one process's nodes."""

    def __init__(self, store: Store, settings: Settings, page: SharedPage, wake: Wake) -> None:
        self._store, self._settings, self._page, self._wake = store, settings, page, wake
        self._policies = policies(settings)
        self._known: dict[tuple[str, int, int | None, float], Bulkhead] = {}

    def of(
        self, operation: Operation, priority: str, level: Level, target_s: float
    ) -> Bulkhead | None:
        """Return the bulkhead of an operation's places, None when nothing limits its nodes now."""
        if not self._is_limited(operation, level):
            return None
        policy, slots = policy_of(operation, self._policies), self._page.slots
        most = workers_for(policy, level, slots=slots, available_mb=None, priority=priority)
        here = (
            max(1, int(self._page.available_mb // policy.max_memory_mb))
            if self._page.available_mb
            else 0
        )
        bounds = operation.name, most, min(most, here) or None, LEASE_S + LONGEST_RUN * target_s
        if bounds not in self._known:
            name, limit, per_host, lease_s = bounds
            self._known[bounds] = Bulkhead(
                f"nodes:{name}",
                self._store,
                limit=limit,
                per_host=per_host,
                lease_s=lease_s,
                wake=self._wake,
            )
        return self._known[bounds]

    def obstacle(self, operation: Operation) -> str:
        """Return why a node of an operation must not start on this host now, '' when it may.

        Memory that this process holds from earlier nodes counts as free for this one.
        """
        if not self._has_policy(operation):
            return ""
        free_mb = self._page.free_mb
        return may_start(
            policy_of(operation, self._policies),
            None if free_mb is None else free_mb + held_mb(os.getpid()),
        )

    def forget(self, pid: int) -> None:
        """Give back the places that a dead process of this machine held."""
        for name in registry.names():  # also of operations that are no longer limited
            place = Bulkhead(f"nodes:{name}", self._store, limit=1, per_host=None, wake=self._wake)
            place.forget(place.owner_of(pid))

    def _is_limited(self, operation: Operation, level: Level) -> bool:
        return level >= Level.HIGH or self._has_policy(operation)

    def _has_policy(self, operation: Operation) -> bool:
        return operation.allocation is not None or self._policies.declares(operation.name)
