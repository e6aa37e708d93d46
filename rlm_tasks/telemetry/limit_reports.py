"""Which limits hold for the calls of operations, and how full they are.

Decides what is told of a bucket and of a bulkhead, side by side.  It knows the limits that
operations declare, which every process that imports them shares, and those of models; refuses to
know how they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlm_tasks.engine.guards import Guards
from rlm_tasks.operations import registry

if TYPE_CHECKING:
    from resilience.bucket import TokenBucket
    from resilience.bulkhead import Bulkhead


@dataclass(frozen=True, slots=True)
class LimitReport:
    """One limit of one service."""

    service: str
    name: str  # of the rate, as declared; "in flight" of a bulkhead
    used: float  # in the last window; now, of a bulkhead
    limit: float
    per_s: float  # the window; 0: it holds at any time
    waiting: int = (
        0  # nodes in line for a bulkhead; those that wait for tokens are parked until a time
    )
    hold_s: float = 0.0  # nothing passes for so long: the provider has asked for it

    @property
    def fill(self) -> float:
        """Used of the limit, 0 to 1."""
        return self.used / self.limit if self.limit else 1.0


def reports(guards: Guards) -> list[LimitReport]:
    """Return what is declared in this process, by service, each limit once.  Raises
    StoreUnavailable.
    """
    services = {about.service: about for about in registry.protections(guards.settings)}
    found: list[LimitReport] = []
    for _, about in sorted(services.items()):
        if (bucket := guards.bucket(about)) is not None:
            found += _rates(bucket)
        if (bulkhead := guards.bulkhead(about)) is not None:
            found.append(_places(about.service, bulkhead))
    return found


def _rates(bucket: TokenBucket) -> Iterator[LimitReport]:
    for name, at in bucket.status().items():
        yield LimitReport(
            service=bucket.name,
            name=name,
            used=at["used"],
            limit=at["limit"],
            per_s=at["per_s"],
            hold_s=at["hold_s"],
        )


def _places(service: str, bulkhead: Bulkhead) -> LimitReport:
    at = bulkhead.status()
    return LimitReport(
        service=service,
        name="in flight",
        used=at["used"],
        limit=at["limit"],
        per_s=0.0,
        waiting=int(at["waiting"]),
    )
