"""A node and each answer of CLAIM, and work that this worker cannot do."""

from __future__ import annotations

import msgspec

from rlm_tasks import JobRequest, NWay
from rlm_tasks.engine.node import _not_admitted, run_node
from rlm_tasks.jobs.spec import SCHEMA, JobSpec
from rlm_tasks.ledger.records import ROOT
from scheduler.admission import WaitingRoom
from tests.unit.harness import Platform
from tests.unit.world import World, world

__all__ = ["world"]


def opened(platform: Platform, **changed: object) -> JobSpec:
    """Open a job whose spec is changed in a way that a client of this version never does."""
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    changed_spec = msgspec.structs.replace(spec, job="other", **changed)
    platform.ledger.open([(changed_spec, "token")], 3600)
    return changed_spec


def contents(platform: Platform, spec: JobSpec) -> dict[str, object]:
    """Return what the keys of a job hold, whatever the order of its hashes."""
    store = platform.store.client
    reads = {
        b"hash": store.hgetall,
        b"zset": lambda key: store.zrange(key, 0, -1, withscores=True),
        b"stream": store.xrange,
        b"none": lambda _: None,
    }
    return {key: reads[store.type(key)](key) for key in platform.keys.of(spec.job)}


def test_a_node_of_an_unknown_operation_is_parked_with_the_reason() -> None:
    platform = Platform()
    spec = opened(platform, operation="summ")

    fills = run_node(platform.runtime, spec.job, ROOT)

    [record] = platform.ledger.records(spec.job, [ROOT])
    assert (fills, record.state) == (False, "p")
    assert record.why == "worker unit does not know operation 'summ'"
    assert run_node(platform.runtime, spec.job, ROOT) is False, "parked: its slot is left as it is"


def test_a_job_of_a_newer_schema_is_left_untouched() -> None:
    platform = Platform()
    spec = opened(platform, schema=SCHEMA + 1)
    before = contents(platform, spec)

    assert run_node(platform.runtime, spec.job, ROOT) is False
    assert platform.ledger.sweep(spec.job).send == ()

    assert contents(platform, spec) == before


def test_a_message_with_nothing_to_run_leaves_or_fills_its_slot() -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(
            operation="sum", items=range(100), strategy=NWay(split_factor=4, min_chunk_size=25)
        )
    )

    assert run_node(platform.runtime, spec.job, "unknown") is False
    assert run_node(platform.runtime, spec.job, ROOT) is False, "cut: its children fill the slot"
    sent = platform.mailbox.sent
    assert run_node(platform.runtime, spec.job, ROOT) is False
    assert platform.mailbox.sent == sent + 4, "all four children still wait, so they are sent again"
    job, first = platform.mailbox.messages[1]
    assert run_node(platform.runtime, job, first) is True
    assert run_node(platform.runtime, job, first) is True, "done: its part may have been lost"
    held = platform.mailbox.messages[2][1]
    platform.ledger.claim(spec.job, held, "somebody", "else")
    assert run_node(platform.runtime, spec.job, held) is False, "busy: the holder fills the slot"
    platform.ledger.stop(spec.job, "cancelled", force=True)
    assert run_node(platform.runtime, spec.job, held) is True, "closed: the chord drains"


def test_a_waiting_job_begins_when_there_is_a_place(world: World) -> None:
    platform = Platform()
    platform.runtime.waiting_room = WaitingRoom(platform.store, platform.keys, 1)
    first = platform.submit(JobRequest(operation="sum", items=range(3)))
    spec = msgspec.structs.replace(first, job="later")
    assert _not_admitted(platform.runtime, first) == ""

    assert _not_admitted(platform.runtime, spec) == "all places are taken (max_jobs=1)"
    platform.mailbox.messages.clear()
    while platform.ledger.facts(first.job)["state"] != "succeeded":
        for node in (ROOT, "merge"):
            run_node(platform.runtime, first.job, node)
    assert _not_admitted(platform.runtime, spec) == ""
