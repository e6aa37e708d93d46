"""What an operation declares to protect its calls.

Decides which declarations make sense, and settles their defaults when the operation is registered,
so that a mistake is told at import.  Refuses to know how guards work: see `guards`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlm_tasks.errors import InvalidRequest

if TYPE_CHECKING:
    from resilience.breaker_storage import BreakerConfig
    from resilience.bucket import Rate
    from resilience.bulkhead import Aimd, Elastic
    from resilience.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Protection:
    """What an operation declares; the guards of one `service` are shared by all operations that
    name it.
    """

    service: str = ""
    breaker: BreakerConfig | str | None = None
    rate_limit: Mapping[str, Rate] = field(default_factory=dict)
    cost: Callable[..., Mapping[str, float]] | None = None
    bulkhead: float | str | Aimd | Elastic | None = None
    per_host: float | None = None
    retry: RetryPolicy | None = None
    fallback: Callable[..., Any] | None = None
    timeout_s: float | None = None

    @property
    def guards_calls(self) -> bool:
        """Whether more than a time-out is declared."""
        return bool(self.breaker or self.rate_limit or self.bulkhead is not None or self.retry)


UNPROTECTED = Protection()


def protection(service: str, about: Mapping[str, Any]) -> Protection:
    """Return what an operation's decorator says, settled.  Raises InvalidRequest, InvalidValue."""
    told = dict(about)
    if told.get("breaker"):
        from resilience.breaker_storage import configured

        told["breaker"] = configured(None if told["breaker"] is True else told["breaker"])
    if told.get("rate_limit") is not None and not isinstance(told["rate_limit"], Mapping):
        told["rate_limit"] = {"requests": told["rate_limit"]}
    if isinstance(told.get("retry"), int):
        from resilience.retry import RetryPolicy

        told["retry"] = RetryPolicy(max_attempts=told["retry"])
    if told.get("cost") is not None and not told.get("rate_limit"):
        raise InvalidRequest(
            "cost", told["cost"], "says what a call takes of rate_limit; declare that, too"
        )
    if told.get("fallback") is not None and not told.get("breaker"):
        raise InvalidRequest(
            "fallback",
            told["fallback"],
            "is called while the breaker is open; declare breaker=..., too",
        )
    if (limit_s := told.get("timeout_s")) is not None and not limit_s > 0:
        raise InvalidRequest("timeout_s", limit_s, "must be above 0 seconds")
    return Protection(service=told.pop("service", "") or service, **told)
