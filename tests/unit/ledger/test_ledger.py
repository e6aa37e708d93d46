"""The ledger's scripts, one transition at a time, on fakeredis."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call
from rlm_tasks import JobRequest, NWay
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import BlockSource, ItemWriter, RangeSource
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import MERGE, ROOT, Child, Claim, Report, Split, Suspect
from rlm_tasks.messaging.dispatch import new_id
from rlm_tasks.settings.sections import LedgerSettings
from scheduler.usage import Usage
from tests.unit.harness import Platform
from tests.unit.world import World, world

__all__ = ["world"]


@pytest.fixture
def platform() -> Platform:
    """A platform whose messages are not delivered."""
    return Platform()


@pytest.fixture
def spec(platform: Platform) -> JobSpec:
    """An open job of a hundred items."""
    return platform.submit(JobRequest(operation="sum", items=range(100), strategy=NWay()))


def child(lo: int, hi: int) -> Child:
    """Return a child that fills the root's slot."""
    return Child(new_id(), lo, hi, 1, "", 0, "task", "because")


def claimed(platform: Platform, spec: JobSpec, node: str = ROOT, token: str = "mine") -> Claim:
    """Claim a node; fail unless it is granted."""
    claim = platform.ledger.claim(spec.job, node, token, "worker")
    assert claim.answer == "run", claim
    return claim


def done(platform: Platform, claim: Claim, mid: int, *kids: Child, **more: object) -> str:
    """Finish a node as a worker does; return the outcome for the job, as FINISH reports it."""
    report = Report(mid=mid, done=mid - claim.lo, kids=list(kids), **more)  # type: ignore[arg-type]  # fields of a report
    finished = platform.ledger.finish(
        claim, report, codec.pack([True, 0, 1, 0.0]) if mid > claim.lo else b""
    )
    return finished.outcome if finished.answer == "ok" else finished.answer


def test_a_node_is_run_by_one_holder(platform: Platform, spec: JobSpec) -> None:
    first = claimed(platform, spec)

    assert (first.lo, first.hi, first.epoch, first.spec) == (0, 100, 1, spec)
    assert platform.ledger.claim(spec.job, ROOT, "other", "w").answer == "busy"
    assert claimed(platform, spec).epoch == 1, (
        "the same token repeats its claim, as if the answer was lost"
    )
    assert platform.ledger.claim(spec.job, "no-such-node", "x", "w").answer == "unknown"
    assert platform.ledger.claim("no-such-job", ROOT, "x", "w").answer == "unknown"


def test_a_finished_job_has_one_last_caller_and_is_closed_once(
    platform: Platform, spec: JobSpec
) -> None:
    claim = claimed(platform, spec)

    assert done(platform, claim, 100) == MERGE
    assert done(platform, claim, 100) == MERGE, (
        "the same caller repeats it, as if the answer was lost"
    )
    assert platform.ledger.close(spec.job, claim.token, "succeeded", b"answer").state == "succeeded"
    assert platform.ledger.close(spec.job, claim.token, "succeeded", b"other").state == ""
    assert platform.ledger.claim(spec.job, ROOT, "late", "w").answer == "closed"
    assert platform.ledger.facts(spec.job)["state"] == "succeeded"


def test_a_cut_registers_its_children_and_waiting_ones_are_sent_again(
    platform: Platform, spec: JobSpec
) -> None:
    left, right = child(40, 70), child(70, 100)

    assert (
        done(
            platform,
            claimed(platform, spec),
            40,
            left,
            right,
            splits=[Split("s", 40, 100, "", 0, "t", 2)],
        )
        == ""
    )

    assert platform.ledger.claim(spec.job, ROOT, "again", "w").waiting == (left.id, right.id)
    assert done(platform, claimed(platform, spec, right.id), 100) == ""
    assert platform.ledger.claim(spec.job, ROOT, "again", "w").waiting == (left.id,)
    assert platform.ledger.claim(spec.job, right.id, "again", "w").answer == "done"
    assert done(platform, claimed(platform, spec, left.id), 70) == MERGE
    assert platform.ledger.ranges(spec.job) == [(0, 40), (40, 70), (70, 100)]


@pytest.mark.parametrize(
    "kids",
    [[child(51, 100)], [child(50, 99)], [child(50, 80), child(79, 100)], [child(50, 101)], []],
    ids=["gap", "short", "overlap", "long", "none"],
)
def test_parts_that_do_not_tile_the_range_are_refused_together(
    platform: Platform, spec: JobSpec, kids: list[Child]
) -> None:
    claim = claimed(platform, spec)

    with pytest.raises(ResponseError, match="TILING"):
        done(platform, claim, 50, *kids)

    assert platform.ledger.facts(spec.job)["done"] == "0"
    assert done(platform, claim, 100) == MERGE


def test_a_holder_that_was_replaced_is_fenced(platform: Platform, spec: JobSpec) -> None:
    stale = claimed(platform, spec)
    assert platform.ledger.release(spec.job, ROOT, stale.token, 7, "SIGKILL")
    fresh = claimed(platform, spec, token="other")

    assert (fresh.epoch, fresh.suspects) == (2, (Suspect(7, 1, "SIGKILL", condemned=False),))
    assert done(platform, stale, 100) == "stale"
    assert not platform.ledger.release(spec.job, ROOT, stale.token, 7, "SIGKILL")
    [word] = platform.store.call(platform.ledger.pulse(stale, 1, 0, 0))
    assert word == b"fenced"
    assert done(platform, fresh, 100) == MERGE


def test_the_sweep_takes_overdue_nodes_back_and_fences_their_holders(
    platform: Platform, spec: JobSpec
) -> None:
    stale = claimed(platform, spec)
    platform.store.client.zadd(platform.keys.of(spec.job).due, {ROOT: 1})

    swept = platform.ledger.sweep(spec.job)

    assert swept.send == (ROOT,)
    assert platform.ledger.sweep(spec.job).send == (), "its message was sent again a moment ago"
    fresh = claimed(platform, spec, token="other")
    assert (fresh.epoch, fresh.losses) == (2, 1)
    assert done(platform, stale, 100) == "stale"


def test_a_holder_keeps_an_expired_lease_until_another_claims(
    platform: Platform, spec: JobSpec
) -> None:
    holder = claimed(platform, spec)
    keys = platform.keys.of(spec.job)
    platform.store.client.zadd(keys.due, {ROOT: 1})
    assert platform.ledger.sweep(spec.job).send == (ROOT,)

    platform.ledger.beat([(spec.job, ROOT, holder.token)])
    assert platform.store.client.zscore(keys.waiting, ROOT) is None
    assert platform.ledger.claim(spec.job, ROOT, "its copy", "w").answer == "busy"
    platform.store.client.zadd(keys.due, {ROOT: 1})
    platform.ledger.sweep(spec.job)
    assert done(platform, holder, 100) == MERGE, "finished late, and no other holder has it"
    assert platform.store.client.zrange(keys.waiting, 0, -1) == []
    assert platform.ledger.claim(spec.job, ROOT, "its copy", "w").answer == "done"


def test_a_parked_node_waits_and_is_woken_by_the_sweep(platform: Platform, spec: JobSpec) -> None:
    claim = claimed(platform, spec)
    platform.ledger.park(claim, 60_000, "a bucket is empty")

    assert platform.ledger.claim(spec.job, ROOT, "x", "w").answer == "parked"
    assert platform.ledger.records(spec.job, [ROOT])[0].why == "a bucket is empty"
    platform.store.client.zadd(platform.keys.of(spec.job).due, {ROOT: 1})
    assert platform.ledger.sweep(spec.job).send == (ROOT,)
    assert claimed(platform, spec, token="other").epoch == 2


def test_a_heartbeat_renews_the_lease_of_its_holder_only(platform: Platform, spec: JobSpec) -> None:
    claim = claimed(platform, spec)
    due = platform.keys.of(spec.job).due
    platform.store.client.zadd(due, {ROOT: 1})

    platform.ledger.beat([(spec.job, ROOT, "somebody else's")])
    assert platform.store.client.zscore(due, ROOT) == 1
    platform.ledger.beat([(spec.job, ROOT, claim.token)])
    assert platform.store.client.zscore(due, ROOT) > 1


def test_a_stopped_job_skips_waiting_nodes_and_lets_running_ones_finish(
    platform: Platform, spec: JobSpec
) -> None:
    left, right = child(10, 50), child(50, 100)
    done(platform, claimed(platform, spec), 10, left, right)
    running = claimed(platform, spec, left.id)

    assert platform.ledger.stop(spec.job, "cancelled") == "running"
    [word] = platform.store.call(platform.ledger.pulse(running, 1, 0, 0))
    assert word == b"stop"
    assert done(platform, running, 20, child(20, 50)) == "closed"

    facts = platform.ledger.facts(spec.job)
    assert (facts["state"], facts["done"], facts["skipped"]) == ("cancelled", "20", "80")
    assert platform.ledger.stop(spec.job, "expired") == "cancelled"


def test_force_ends_a_job_whose_nodes_do_not_finish(platform: Platform, spec: JobSpec) -> None:
    stuck = claimed(platform, spec)

    assert platform.ledger.stop(spec.job, "cancelled") == "running"
    assert platform.ledger.stop(spec.job, "cancelled", force=True) == "cancelled"
    assert done(platform, stuck, 100) == "stale"
    assert platform.ledger.facts(spec.job)["skipped"] == "100"


def test_partials_are_compacted_only_while_they_are_all_there(
    platform: Platform, spec: JobSpec
) -> None:
    left, right = child(10, 50), child(50, 100)
    done(platform, claimed(platform, spec), 10, left, right)
    done(platform, claimed(platform, spec, right.id), 100)

    assert not platform.ledger.compact(spec.job, [(0, 10), (50, 100)], b"gap")
    assert not platform.ledger.compact(spec.job, [(0, 10), (10, 50)], b"missing")
    done(platform, claimed(platform, spec, left.id), 30, child(30, 50))
    assert platform.ledger.compact(spec.job, [(0, 10), (10, 30)], b"one")
    assert list(platform.ledger.pieces(spec.job, 0, 50)) == [(0, 30, b"one")]


def test_every_key_of_a_job_expires_and_no_shared_key_does(
    platform: Platform, spec: JobSpec
) -> None:
    done(
        platform,
        claimed(platform, spec),
        40,
        child(40, 100),
        failed=[3],
        failures=[(3, "{}")],
        skipped=[4],
    )

    keys = list(platform.store.client.scan_iter("unit:*"))
    assert len(keys) > 8
    lasting = {key.decode() for key in keys if platform.store.client.ttl(key) == -1}
    assert lasting == {platform.keys.due, platform.keys.jobs}


def test_a_message_that_arrives_after_its_probe_does_not_make_the_others_lost(
    platform: Platform, spec: JobSpec
) -> None:
    left, right = child(0, 50), child(50, 100)
    done(platform, claimed(platform, spec), 0, left, right)
    waiting, store = platform.keys.of(spec.job).waiting, platform.store.client
    store.hset(platform.keys.of(spec.job).job, mapping={"claimed_ms": 0, "seen_ms": 0})
    store.zadd(waiting, {left.id: 1, right.id: 2})
    assert platform.ledger.sweep(spec.job).send == (left.id,), "the probe"

    assert platform.ledger.claim(spec.job, left.id, "original", "w", 0).answer == "run"
    assert platform.ledger.sweep(spec.job).send == (), (
        "its queue is long, and its messages are not lost"
    )
    platform.ledger.release(spec.job, left.id, "original", -1, "")
    [record] = platform.ledger.records(spec.job, [left.id])
    assert platform.ledger.claim(spec.job, left.id, "copy", "w", record.message).answer == "run"
    assert platform.ledger.sweep(spec.job).send == (right.id,), (
        "the message that the copy overtook is lost"
    )


def test_a_round_trip_that_is_repeated_counts_usage_once(world: World) -> None:
    """The answer of the first FINISH is lost; the second one finds the node closed."""
    store = world.store()
    store.patience_s, store._sleep = 10.0, world.sleep
    ledger = Ledger(store, Keys("unit"), LedgerSettings(), on_outage="wait")
    usage = Usage(store, Keys("unit"))
    job = JobSpec("job", "sum", RangeSource(0, 1), 10, Shape("flat"), "queue")
    ledger.open([(job, "none")], 60)
    claim = ledger.claim("job", ROOT, "mine", "w")
    run = store._run

    def loses_an_answer(*calls: Call) -> list[Any]:
        run(*calls)
        store._run = run  # type: ignore[method-assign]  # the connection is back
        raise RedisConnectionError("cut off by the test")

    store._run = loses_an_answer  # type: ignore[method-assign,assignment]  # loses the first answer
    tally = usage.tally("sum", done=10, failed=0, busy_us=5, memory_kb=1, version=1)
    assert ledger.finish(claim, Report(mid=10, done=10), b"x", once=[tally]).outcome == MERGE

    assert ledger.facts("job")["done"] == "10"
    _, counts = Keys("unit").usage("sum")
    assert int(store.client.hget(counts, "done")) == 10


def test_a_job_that_is_opened_after_a_sweep_found_none_is_swept(platform: Platform) -> None:
    opening: list[Call] = []
    run, store = platform.store._run, platform.store
    store._run = lambda *calls: opening.extend(calls) or [1]  # the request is late
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    store._run = run
    platform.mailbox.messages.clear()

    assert platform.ledger.sweep(spec.job).state == "unknown"
    [late] = [each for each in opening if each.script.name == "open"]
    store.call(late)
    store.call(platform.ledger.due.look_again(spec.job, 0, platform.keys.of(spec.job).job))

    assert platform.ledger.due.jobs(10) == [spec.job]


def test_a_job_whose_staged_items_are_lost_is_not_opened(platform: Platform) -> None:
    """A restart of Redis may lose its latest writes between the items and the job."""
    ledger = platform.ledger
    spec = JobSpec("job", "sum", BlockSource(), 3, Shape("flat"), "queue")

    with pytest.raises(StoreUnavailable, match="lost items that were stored for a job"):
        ledger.open([(spec, "token")], 60)
    assert ledger.facts("job") == {}

    index, blocks = platform.keys.staged("job", "token")
    writer = ItemWriter(platform.store, index, blocks, max_item_bytes=1000)
    source_of([1, 2, 3]).write(writer)
    assert ledger.open([(spec, "token")], 60) == [True]


def test_a_job_leaves_the_index_only_while_its_record_says_that_it_has_ended(
    platform: Platform, spec: JobSpec
) -> None:
    """Redis may lose the end of a job before the job leaves the index."""
    ledger, record = platform.ledger, platform.keys.of(spec.job).job

    platform.store.call(ledger.due.look_again(spec.job, 0, record))
    assert ledger.due.jobs(10) == [spec.job]

    ledger.stop(spec.job, "cancelled")
    platform.store.call(ledger.due.look_again(spec.job, 0, record))
    assert ledger.due.jobs(10) == []
