"""Reports on the limits of operations and models: the amounts that are allowed and used.

Clients, the remote control command and the worker's port call `limit_reports`.  It reads the limits
that operations and models declare, here and on live workers, and lists buckets and bulkheads
together.  Workers report their declarations with `declared_limits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlm_tasks.engine.guards import ProcessGuards
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.operations import registry
from rlm_tasks.operations.protection import Protection
from scheduler.board import DeclaredLimit, HostReport

if TYPE_CHECKING:
    from resilience.bucket import TokenBucket
    from resilience.bulkhead import Bulkhead

MOST_DECLARED = 200
"""A worker reports this many limits."""


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


def declared_limits(guards: ProcessGuards) -> tuple[DeclaredLimit, ...]:
    """Return the limits that the operations and models of this process declare, each once."""
    found = (each for protection in _own(guards).values() for each in _of(guards, protection))
    return tuple(found)[:MOST_DECLARED]


def _own(guards: ProcessGuards) -> dict[str, Protection]:
    """Return the guards that this process declares, by service."""
    return {each.service: each for each in registry.protections(guards.settings)}


def _of(guards: ProcessGuards, protection: Protection) -> Iterator[DeclaredLimit]:
    for unit, rate in protection.rate_limit.items():
        yield DeclaredLimit(protection.service, unit, rate.limit, rate.per_s, rate.burst or 0.0)
    if (bulkhead := guards.bulkhead(protection)) is not None:
        yield DeclaredLimit(protection.service, "", bulkhead.limit, moves=bulkhead.moves)


def limit_reports(guards: ProcessGuards, hosts: Sequence[HostReport] = ()) -> list[LimitReport]:
    """Return the limits that live workers and this process declare, by service, each once.

    A worker's declaration comes before one of this process, which may have other settings.  Raises
    StoreUnavailable.
    """
    guards = _fresh(guards, hosts)
    found: list[LimitReport] = []
    for service, protection in sorted(_services(guards, hosts).items()):
        if (bucket := guards.bucket(protection)) is not None:
            found += _bucket_reports(bucket)
        if (bulkhead := guards.bulkhead(protection)) is not None:
            found.append(_bulkhead_report(service, bulkhead))
    return found


def bucket_of(guards: ProcessGuards, name: str, hosts: Sequence[HostReport] = ()) -> TokenBucket:
    """Return the rate limit of a service.  Raises InvalidRequest with the names that there are."""
    guards = _fresh(guards, hosts)
    limited = {
        service: each for service, each in _services(guards, hosts).items() if each.rate_limit
    }
    bucket = guards.bucket(limited[name]) if name in limited else None
    if bucket is None:
        known = ", ".join(sorted(limited)) or "none"
        raise InvalidRequest("name", name, f"there is no such rate limit; there are: {known}")
    return bucket


def _fresh(guards: ProcessGuards, hosts: Sequence[HostReport]) -> ProcessGuards:
    """Return guards without limits: those built before may have the values of this process."""
    if not hosts:
        return guards
    return ProcessGuards(guards.store, guards.settings, lambda _: None)


def _services(guards: ProcessGuards, hosts: Sequence[HostReport]) -> Mapping[str, Protection]:
    """Return the guards by service, as the first worker that reports one declares it."""
    told: dict[str, Protection] = {}
    for host in reversed(hosts):
        told |= _told(host.limits)
    return {**_own(guards), **told}


def _told(limits: Iterable[DeclaredLimit]) -> dict[str, Protection]:
    from resilience.bucket import Rate
    from resilience.bulkhead import Aimd

    rates: dict[str, dict[str, Rate]] = {}
    bulkheads: dict[str, float | Aimd] = {}
    for each in limits:
        if each.unit:
            rate = Rate(each.limit, each.per_s, each.burst or None)
            rates.setdefault(each.service, {})[each.unit] = rate
        else:
            # A report reads a limit that moves from Redis, whatever moves it.
            moving = Aimd(each.limit, each.limit) if each.moves else each.limit
            bulkheads[each.service] = moving
    return {
        service: Protection(
            service, rate_limit=rates.get(service, {}), bulkhead=bulkheads.get(service)
        )
        for service in rates | bulkheads
    }


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
