"""The ledger's scripts against an oracle, on a real server."""

from __future__ import annotations

import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from rlm_tasks.testing import embedded
from tests.support import examples
from tests.unit.ledger_model import LedgerMachine


def test_the_ledger_agrees_with_the_oracle_on_a_real_server(durable: embedded.Server) -> None:
    client = redis.Redis.from_url(durable.url)

    class OnRealServer(LedgerMachine):
        connect = staticmethod(lambda: client)

    run_state_machine_as_test(
        OnRealServer,
        settings=settings(
            max_examples=examples(100),
            stateful_step_count=50,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    client.close()
