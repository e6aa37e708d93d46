"""docs/resilience.md matches the code about guards."""

from __future__ import annotations

from rlm_tasks.engine.guards import ORDER
from tests.integration.conftest import ROOT

PAGE = (ROOT / "docs" / "resilience.md").read_text(encoding="utf-8")


def test_the_page_names_the_guards_in_their_order() -> None:
    assert ORDER == ("deadline", "retry", "rate_limit", "breaker", "bulkhead")
    assert "time limit, retry, rate limit, breaker, bulkhead" in PAGE
