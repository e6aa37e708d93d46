"""Commands that the ledger's scripts cost a real server: few for a leaf, bounded for any job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlm_tasks import Client
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import MAX_FANOUT, Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger.records import ROOT, Child, Report
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of


@pytest.fixture(scope="module")
def alone() -> Iterator[Client]:
    """A client of a server that nobody else calls."""
    with embedded.server() as server, client_of(environment_of(server.url, "costs")) as client:
        yield client


def cut(client: Client, job: str, parts: int) -> list[Child]:
    """Open a job and cut its first node into nodes of one item; return them."""
    spec = JobSpec(
        job, "echo", RangeSource(0, 1), parts, Shape("flat"), "q", continue_on_error=True
    )
    client.ledger.open([(spec, "none")], 3600)
    claim = client.ledger.claim(job, ROOT, "root", "w")
    kids = [Child(f"{job}{at}", at, at + 1, 1, "", 0, "t", "") for at in range(parts)]
    client.ledger.finish(claim, Report(mid=0, kids=kids), b"")
    return kids


def commands(client: Client, work: Callable[[], Any]) -> int:
    """Return the commands that the server runs meanwhile, with those of scripts."""
    store = client.ledger.store.client
    store.config_resetstat()
    work()
    stats: dict[str, Any] = store.info("commandstats")
    return sum(each["calls"] for name, each in stats.items() if "resetstat" not in name)


def run(client: Client, job: str, kid: Child) -> None:
    """Run a node to its end."""
    claim = client.ledger.claim(job, kid.id, kid.id, "w")
    client.ledger.finish(claim, Report(mid=kid.hi, done=1), codec.pack([1]))


def test_a_leaf_costs_the_ledger_26_commands(alone: Client) -> None:
    kids = cut(alone, "leaf", 50)
    for kid in kids[:10]:
        run(alone, "leaf", kid)

    def run_some() -> None:
        for kid in kids[10:40]:
            run(alone, "leaf", kid)

    assert commands(alone, run_some) == 30 * 26


def test_a_cut_costs_as_many_commands_with_a_thousand_parts_as_with_ten(alone: Client) -> None:
    few = commands(alone, lambda: cut(alone, "few", 10))
    many = commands(alone, lambda: cut(alone, "many", MAX_FANOUT))

    assert many <= few + 12, "records and members are written in pages"


def test_a_script_that_ends_a_job_skips_a_bounded_number_of_nodes(alone: Client) -> None:
    cut(alone, "ends", 2500)
    stop = alone.ledger._script("stop", "ends", "cancelled", "", b"", 0)

    assert commands(alone, lambda: alone.ledger.call(stop)) <= 40
    skipped = int(alone.ledger.facts("ends")["nodes_skipped"])
    assert 0 < skipped <= 1000
    calls = commands(alone, alone.job("ends").cancel)
    facts = alone.ledger.facts("ends")
    assert (facts["state"], facts["skipped"], facts["nodes_skipped"]) == (
        "cancelled",
        "2500",
        "2500",
    )
    assert calls <= 300


def test_messages_share_the_client_of_their_channel(alone: Client) -> None:
    with alone.session.app.connection_for_write() as connection:
        channel: Any = connection.channel()
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert first is second
        channel._disconnect_pools()  # as kombu does after a fork
        with channel.conn_or_acquire() as third:
            assert third is not first
            assert third.ping()
