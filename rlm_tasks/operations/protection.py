"""The guards that an operation declares for its calls, checked when the operation is registered.

`registry.operation` calls `protection`, so a mistake raises at import.  `engine.guards` applies the
declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.errors import refuse_unless_name, refuse_unless_positive
from rlm_tasks.errors import InvalidRequest

if TYPE_CHECKING:
    from resilience.breaker_storage import BreakerConfig
    from resilience.bucket import Rate
    from resilience.bulkhead import Aimd, Elastic
    from resilience.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Protection:
    """The declared guards of an operation; operations with one `service` share them."""

    service: str = ""
    breaker: BreakerConfig | str | None = None
    rate_limit: Mapping[str, Rate] = field(default_factory=dict)
    cost: Callable[..., Mapping[str, float]] | None = None
    bulkhead: float | str | Aimd | Elastic | None = None
    per_host: float | None = None
    weight: float | Callable[..., float] = 1.0
    retry: RetryPolicy | None = None
    fallback: Callable[..., Any] | None = None
    timeout_s: float | None = None

    @property
    def guards_calls(self) -> bool:
        """Whether a guard other than the time limit is declared."""
        return bool(
            self.breaker
            or self.rate_limit
            or self.bulkhead is not None
            or self.retry
            or self.fallback
        )


UNPROTECTED = Protection()


def protection(service: str, about: Mapping[str, Any]) -> Protection:
    """Return the guards of an operation's decorator with their defaults filled in.

    Raises InvalidRequest, InvalidValue.
    """
    declared = dict(about)
    _check_names(declared)
    if declared.get("breaker"):
        from resilience.breaker_storage import configured

        declared["breaker"] = configured(
            None if declared["breaker"] is True else declared["breaker"]
        )
    if declared.get("rate_limit") is not None:
        declared["rate_limit"] = _rates(declared["rate_limit"])
    if declared.get("retry") is not None:
        declared["retry"] = retry_policy(declared["retry"])
    if declared.get("cost") is not None and not declared.get("rate_limit"):
        raise InvalidRequest(
            "cost",
            declared["cost"],
            "is the amount a call takes of rate_limit; declare rate_limit=..., too",
        )
    _check_weight(declared)
    for name in ("timeout_s", "per_host"):
        if declared.get(name) is not None:
            refuse_unless_positive(name, declared[name], error=InvalidRequest)
    if declared.get("bulkhead") is not None:
        from resilience.bulkhead import capacity

        most = capacity(declared["bulkhead"], "bulkhead")
        refuse_unless_positive("bulkhead", most, error=InvalidRequest)
    return Protection(service=declared.pop("service", "") or service, **declared)


def _check_names(declared: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a service, or a name of a field, that is no text."""
    refuse_unless_name("service", declared.get("service") or "default", InvalidRequest)
    for name in ("breaker", "retry", "rate_limit"):
        fields = declared.get(name)
        if isinstance(fields, Mapping) and not all(isinstance(each, str) for each in fields):
            raise InvalidRequest(name, fields, "the names of its fields must be texts")


def _rates(declared: Any) -> dict[str, Rate]:
    """Return the rates by unit; a Rate alone limits requests."""
    from resilience.bucket import check_rates

    rates = dict(declared) if isinstance(declared, Mapping) else {"requests": declared}
    check_rates(rates, "rate_limit")
    return rates


def retry_policy(declared: Any) -> RetryPolicy:
    """Return a policy as it is, or make one from a number of attempts or a dict of its fields.

    Raises InvalidRequest, and InvalidValue for a wrong field.
    """
    from resilience.retry import RetryPolicy

    if isinstance(declared, RetryPolicy):
        return declared
    if isinstance(declared, Mapping):
        return RetryPolicy(**declared)
    if isinstance(declared, int) and not isinstance(declared, bool):
        return RetryPolicy(max_attempts=declared)
    raise InvalidRequest(
        "retry", declared, "must be a RetryPolicy, a dict of its fields, or a number of attempts"
    )


def _check_weight(declared: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a weight that no bulkhead can grant."""
    if (weight := declared.get("weight")) is None:
        return
    if declared.get("bulkhead") is None:
        raise InvalidRequest(
            "weight",
            weight,
            "is the part that a call takes of bulkhead; declare bulkhead=..., too",
        )
    if callable(weight):
        return
    from resilience.bulkhead import capacity

    most = min(capacity(declared["bulkhead"]), declared.get("per_host") or float("inf"))
    if not isinstance(weight, int | float) or not 0 < weight <= most:
        raise InvalidRequest(
            "weight",
            weight,
            f"must be above 0 and at most {most:g}, the most that bulkhead and per_host grant, "
            "or a function of the item that returns such a number",
        )
