"""Reports on the limits of operations and models: the amounts that are allowed and used.

Clients, the remote control command and the worker's port call `limit_reports`.  It reads the limits
that the operations and models of this process declare, and lists buckets and bulkheads together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlm_tasks.engine.guards import ProcessGuards
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.operations import registry

if TYPE_CHECKING:
    from resilience.bucket import TokenBucket
    from resilience.bulkhead import Bulkhead


@dataclass(frozen=True, slots=True)
class LimitReport:
    """One limit of one service."""

    service: str
    name: str  # a rate's name as declared; "in flight" for a bulkhead
    used: float  # in the last window; for a bulkhead, now
    limit: float
    per_s: float  # the window in seconds; 0: the limit holds at any time
    waiting: int = 0  # nodes in line for a bulkhead; for tokens, nodes are parked until a time
    hold_s: float = 0.0  # nothing passes for this time, because the provider asked for it

    @property
    def fill(self) -> float:
        """The used share of the limit, 0 to 1."""
        return self.used / self.limit if self.limit else 1.0


def limit_reports(guards: ProcessGuards) -> list[LimitReport]:
    """Return the limits that this process declares, by service, each limit once.

    Raises StoreUnavailable.
    """
    services = {each.service: each for each in registry.protections(guards.settings)}
    found: list[LimitReport] = []
    for _, protection in sorted(services.items()):
        if (bucket := guards.bucket(protection)) is not None:
            found += _bucket_reports(bucket)
        if (bulkhead := guards.bulkhead(protection)) is not None:
            found.append(_bulkhead_report(protection.service, bulkhead))
    return found


def bucket_of(guards: ProcessGuards, name: str) -> TokenBucket:
    """Return the rate limit of a service.  Raises InvalidRequest with the names that there are."""
    limited = {
        each.service: each for each in registry.protections(guards.settings) if each.rate_limit
    }
    bucket = guards.bucket(limited[name]) if name in limited else None
    if bucket is None:
        known = ", ".join(sorted(limited)) or "none"
        raise InvalidRequest("name", name, f"there is no such rate limit; there are: {known}")
    return bucket


def _bucket_reports(bucket: TokenBucket) -> Iterator[LimitReport]:
    for name, status in bucket.status().items():
        yield LimitReport(
            service=bucket.name,
            name=name,
            used=status["used"],
            limit=status["limit"],
            per_s=status["per_s"],
            hold_s=status["hold_s"],
        )


def _bulkhead_report(service: str, bulkhead: Bulkhead) -> LimitReport:
    status = bulkhead.status()
    return LimitReport(
        service=service,
        name="in flight",
        used=status["used"],
        limit=status["limit"],
        per_s=0.0,
        waiting=int(status["waiting"]),
    )
