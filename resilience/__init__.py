"""Guards for calls to services: breakers, token buckets, bulkheads, retries, budgets, time limits.

    from resilience import CircuitBreaker, Store, TokenBucket, with_circuit_breaker, with_retry

All processes share their state through Redis.  The workers call them, and a web service may share
the same guards, because the package needs no Celery.  Begin with `store`, then one guard, such as
`breaker`.  The public names are stable, and load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreaker as CircuitBreaker
    from resilience.breaker import CircuitBreakers as CircuitBreakers
    from resilience.breaker import CircuitOpen as CircuitOpen
    from resilience.breaker import with_circuit_breaker as with_circuit_breaker
    from resilience.breaker_storage import BreakerConfig as BreakerConfig
    from resilience.bucket import PROVIDER as PROVIDER
    from resilience.bucket import ROUTER as ROUTER
    from resilience.bucket import Grant as Grant
    from resilience.bucket import LeasedBucket as LeasedBucket
    from resilience.bucket import Rate as Rate
    from resilience.bucket import TokenBucket as TokenBucket
    from resilience.bulkhead import Aimd as Aimd
    from resilience.bulkhead import Bulkhead as Bulkhead
    from resilience.bulkhead import Elastic as Elastic
    from resilience.bulkhead import Permit as Permit
    from resilience.errors import BulkheadFull as BulkheadFull
    from resilience.errors import CallTimeout as CallTimeout
    from resilience.errors import Category as Category
    from resilience.errors import Denied as Denied
    from resilience.errors import InvalidValue as InvalidValue
    from resilience.errors import NeverSatisfiable as NeverSatisfiable
    from resilience.errors import RateLimited as RateLimited
    from resilience.errors import RetryBudgetExhausted as RetryBudgetExhausted
    from resilience.errors import RlmError as RlmError
    from resilience.errors import Severity as Severity
    from resilience.errors import StoreFull as StoreFull
    from resilience.errors import StoreReadOnly as StoreReadOnly
    from resilience.errors import StoreUnauthorised as StoreUnauthorised
    from resilience.errors import StoreUnavailable as StoreUnavailable
    from resilience.fault_log import FaultLog as FaultLog
    from resilience.faults import Fault as Fault
    from resilience.faults import classify as classify
    from resilience.retry import Retry as Retry
    from resilience.retry import RetryBudget as RetryBudget
    from resilience.retry import RetryPolicy as RetryPolicy
    from resilience.retry import execute_with_retry as execute_with_retry
    from resilience.retry import with_retry as with_retry
    from resilience.store import Store as Store
    from resilience.store import default_store as default_store
    from resilience.timeouts import Timeouts as Timeouts
    from resilience.timeouts import TimeoutSettings as TimeoutSettings

_HOMES = {
    "breaker": "CircuitBreaker CircuitBreakers CircuitOpen with_circuit_breaker",
    "breaker_storage": "BreakerConfig",
    "bucket": "PROVIDER ROUTER Grant LeasedBucket Rate TokenBucket",
    "bulkhead": "Aimd Bulkhead Elastic Permit",
    "errors": "BulkheadFull CallTimeout Category Denied InvalidValue NeverSatisfiable RateLimited "
    "RetryBudgetExhausted RlmError Severity StoreFull StoreReadOnly StoreUnauthorised "
    "StoreUnavailable",
    "fault_log": "FaultLog",
    "faults": "Fault classify",
    "retry": "Retry RetryBudget RetryPolicy execute_with_retry with_retry",
    "store": "Store default_store",
    "timeouts": "TimeoutSettings Timeouts",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # the list and its loader must not drift apart


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"resilience.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
