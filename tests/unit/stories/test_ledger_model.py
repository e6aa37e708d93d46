"""The scripts of the ledger against an oracle, on fakeredis; tests/faults does the same on a
server.
"""

from __future__ import annotations

import fakeredis
from hypothesis import HealthCheck, settings

from tests.support import examples
from tests.unit.ledger_model import LedgerMachine


class OnFakeredis(LedgerMachine):
    """The machine on a new server for each run."""

    connect = staticmethod(lambda: fakeredis.FakeRedis(server=fakeredis.FakeServer()))


TestLedgerOnFakeredis = OnFakeredis.TestCase
TestLedgerOnFakeredis.settings = settings(
    max_examples=examples(20),
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
