"""Operations with long names, for tests of the width of the command line."""

from __future__ import annotations

from typing import Any

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from rlm_tasks import operation

REMITTANCE = "accounting.reconcile_remittances_of_all_subsidiaries"
EXTRACTION = "documents.extract_obligations_from_signed_contracts"


@operation(
    REMITTANCE,
    service="payments-gateway-of-the-european-subsidiaries",
    breaker=BreakerConfig(failure_threshold=100, recovery_timeout_s=600),
    rate_limit={"requests": Rate(10_000_000, per_s=60), "tokens": Rate(1_500.5, per_s=1)},
    bulkhead=12,
)
def reconcile(item: Any) -> Any:
    """Return the item; an odd number fails."""
    if item % 2:
        raise ValueError(f"{item} has no counterpart in the ledger of the subsidiary in Rotterdam")
    return item


@operation(EXTRACTION)
def extract(item: int) -> int:
    """Return the item."""
    return item
