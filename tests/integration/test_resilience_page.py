"""What docs/resilience.md says of the guards is the code's."""

from __future__ import annotations

from rlm_tasks.engine.guards import ORDER
from tests.integration.conftest import ROOT

PAGE = (ROOT / "docs" / "resilience.md").read_text(encoding="utf-8")


def test_the_order_of_the_guards_is_told_as_it_is() -> None:
    assert ORDER == ("deadline", "retry", "rate_limit", "breaker", "bulkhead")
    assert "time limit, retry, rate limit, breaker, bulkhead" in PAGE
