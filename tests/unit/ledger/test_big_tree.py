"""A job with many nodes: old records are only counted, and readers read sums and bounded parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import redis

from rlm_tasks import JobRequest, NWay, operation
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger import ledger, partials, reader, records
from rlm_tasks.ledger.at_work import HELD_AT_ONCE, held_nodes, jobs_at_work, nodes_at_work
from rlm_tasks.ledger.records import ROOT, SWEEP_AT_ONCE, Child, JobNodes, NodesAtWork, Report
from rlm_tasks.ledger.tree import read_tree
from rlm_tasks.operations import registry
from rlm_tasks.settings.model import Settings
from tests.unit.harness import Platform, host

KEPT = 20


def _not_fails(text: str) -> None:
    if text == "fails":
        raise ValueError("it fails in validation")


@operation("unit_big_validated", validate=_not_fails)
def unit_big_validated(text: str) -> str:
    """Return the item."""
    return text


@pytest.fixture
def platform() -> Platform:
    """A platform whose jobs keep the records of twenty ended nodes."""
    return Platform(settings=Settings(namespace="unit", ledger={"node_records": KEPT}))


def opened(platform: Platform, n: int) -> JobSpec:
    """Open a job whose nodes are handed out one by one."""
    return platform.submit(JobRequest(operation="sum", items=range(n), strategy=NWay()))


def fan_out(platform: Platform, spec: JobSpec, first: int = 0) -> list[Child]:
    """Cut the root into nodes of one item each."""
    claim = platform.ledger.claim(spec.job, ROOT, "root", "w")
    kids = [Child(f"n{at}", at, at + 1, 1, "", 0, "t", "because") for at in range(first, spec.n)]
    platform.ledger.finish(claim, Report(mid=first, done=first, kids=kids), b"x" if first else b"")
    return kids


def run(platform: Platform, spec: JobSpec, kids: list[Child]) -> str:
    """Run nodes of one item to their end; return the outcome of the last one."""
    for kid in kids:
        claim = platform.ledger.claim(spec.job, kid.id, kid.id, "w")
        outcome = platform.ledger.finish(claim, Report(mid=kid.hi, done=1), b"x").outcome
    return outcome


class Counting(redis.Redis):
    """A connection that counts commands, and the fields and members that they return."""

    commands: Counter[str]
    read = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        answer = super().execute_command(*args, **options)
        self.commands[args[0]] += 1
        self.read += len(answer) if isinstance(answer, list | dict) else 1
        return answer

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        """Return a pipeline whose commands are counted, too."""
        pipe = super().pipeline(transaction, shard_hint)
        run_all = pipe.execute

        def execute(raise_on_error: bool = True) -> list[Any]:
            self.commands.update(each[0][0] for each in pipe.command_stack)
            answers: list[Any] = run_all(raise_on_error)
            self.read += sum(len(a) if isinstance(a, list | dict) else 1 for a in answers)
            return answers

        pipe.execute = execute
        return pipe


def counted(platform: Platform) -> Counting:
    """Count from now on the commands that the platform sends."""
    client = Counting(connection_pool=platform.store.client.connection_pool)
    client.commands = Counter()
    platform.store._client = client
    return client


def test_records_beyond_the_bound_are_folded_into_counts(platform: Platform) -> None:
    spec = opened(platform, 60)
    kids = fan_out(platform, spec)

    assert run(platform, spec, kids) == "merge"
    facts, keys = platform.ledger.facts(spec.job), platform.keys.of(spec.job)
    assert platform.store.client.hlen(keys.nodes) == KEPT + 2, "and the root, and the merge"
    assert (facts["nodes"], facts["pruned"], facts["done"]) == ("61", "40", "60")
    assert len(platform.ledger.ranges(spec.job)) == 60, "partials are no records"
    nodes, total = read_tree(platform.ledger, spec.job, 10_000)
    assert (len(nodes), total) == (KEPT + 2, 62)


@pytest.mark.parametrize("seed", range(2))
def test_folded_records_change_no_answer(seed: int) -> None:
    settings = Settings(namespace="unit", ledger={"node_records": KEPT})
    platform = Platform(seed, settings=settings)
    spec = platform.submit(
        JobRequest(
            operation="sum",
            items=list(range(120)),
            strategy=NWay(split_factor=3, min_chunk_size=1, max_depth=10),
        )
    )

    facts = platform.run(spec)

    assert facts["state"] == "succeeded"
    assert platform.output(spec) == sum(range(120))
    assert int(facts["nodes"]) > 2 * KEPT
    assert platform.store.client.hlen(platform.keys.of(spec.job).nodes) <= KEPT + 2


def test_a_late_message_of_a_folded_node_runs_nothing(platform: Platform) -> None:
    spec = opened(platform, 60)
    kids = fan_out(platform, spec)
    run(platform, spec, kids[:50])

    assert platform.ledger.claim(spec.job, kids[0].id, "late", "w").answer == "unknown"
    assert platform.ledger.claim(spec.job, kids[49].id, "late", "w").answer == "done"
    assert platform.ledger.facts(spec.job)["done"] == "50"


def test_a_look_at_a_big_job_reads_sums_and_a_bounded_part(platform: Platform) -> None:
    spec = opened(platform, 500)
    kids = fan_out(platform, spec)
    run(platform, spec, kids[:60])
    for kid in kids[60:65]:
        claim = platform.ledger.claim(spec.job, kid.id, kid.id, "w")
    platform.ledger.park(claim, 60_000, "bucket llm: requests")
    client = counted(platform)

    facts = platform.ledger.facts(spec.job)
    at_work = nodes_at_work(platform.ledger, spec.job, facts)
    assert at_work == NodesAtWork(435, 4, 1, {"bucket llm: requests": 1})
    assert client.commands == {"HGETALL": 1, "ZCARD": 2}

    client.commands.clear()
    client.read = 0
    assert held_nodes(platform.ledger, spec.job, facts) == replace(at_work, holders={"w": 4})
    assert platform.explain(spec.job, host("w")) == (
        "It runs on 4 slots, with 435 nodes queued and 1 parked (bucket llm: requests)."
    )
    assert client.read <= 2 * HELD_AT_ONCE

    client.commands.clear()
    client.read = 0
    nodes, total = read_tree(platform.ledger, spec.job, 50)
    assert (len(nodes), total) == (50, 501)
    assert Counter(record.state for record in nodes) == {"c": 1, "r": 4, "p": 1, "q": 44}
    assert client.commands.total() <= 6
    assert client.read <= 4 * 50 + 10, "elements of answers"


def test_the_nodes_of_all_jobs_are_counted_without_their_records(platform: Platform) -> None:
    specs = [opened(platform, 30) for _ in range(3)]
    for spec in specs:
        fan_out(platform, spec)
    claim = platform.ledger.claim(specs[0].job, "n7", "mine", "w")
    platform.ledger.park(claim, 60_000, "it waits")
    client = counted(platform)

    at_work = {each.job: each for each in jobs_at_work(platform.ledger, 10)}
    first = specs[0].job
    assert at_work[first] == JobNodes(first, specs[0].queue, "running", 29, 0, 1)
    assert client.commands == {"ZRANGE": 1, "HMGET": 3, "ZCARD": 6}


def test_many_different_reasons_fill_no_more_than_the_bound_of_fields(platform: Platform) -> None:
    spec = opened(platform, 250)
    kids = fan_out(platform, spec)
    for kid in kids:
        claim = platform.ledger.claim(spec.job, kid.id, kid.id, "w")
        platform.ledger.park(claim, 60_000, f"reason {kid.lo}")

    facts = platform.ledger.facts(spec.job)
    assert len(facts) <= 201
    at_work = nodes_at_work(platform.ledger, spec.job, facts)
    assert (at_work.parked, sum(at_work.reasons.values())) == (250, 250)
    for kid in kids:
        assert platform.ledger.unpark(spec.job, kid.id)
    facts = platform.ledger.facts(spec.job)
    assert facts["parked"] == "0"
    assert not [name for name in facts if name.startswith("why:")]


def test_one_sweep_of_a_big_job_sends_a_bounded_number_and_comes_again(platform: Platform) -> None:
    spec = opened(platform, 250)
    kids = fan_out(platform, spec)
    for kid in kids:
        claim = platform.ledger.claim(spec.job, kid.id, kid.id, "w")
        platform.ledger.park(claim, 0, "due at once")
    client = counted(platform)

    swept = platform.ledger.sweep(spec.job)
    assert (len(swept.send), swept.more) == (SWEEP_AT_ONCE, True)
    assert swept.again_ms <= platform.ledger.store.now_ms() + 50
    assert client.commands.total() <= 4


def test_members_of_a_large_set_are_read_in_pages(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MEMBERS_AT_ONCE", 7)
    spec = opened(platform, 60)
    run(platform, spec, fan_out(platform, spec))
    client = counted(platform)

    assert platform.ledger.ranges(spec.job) == [(at, at + 1) for at in range(60)]
    assert client.commands == {"ZRANGE": 9}
    assert client.read == 60


def test_a_script_reads_partials_until_they_are_large(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIECES_BYTES", 1000)
    spec = opened(platform, 60)
    for kid in fan_out(platform, spec):
        claim = platform.ledger.claim(spec.job, kid.id, kid.id, "w")
        platform.ledger.finish(claim, Report(mid=kid.hi, done=1), b"x" * 400)
    found, call = [], platform.ledger.call

    def watched(*calls: Any) -> Any:
        answers = call(*calls)
        found.append(sum(map(len, answers[0][1::2])))
        return answers

    monkeypatch.setattr(platform.ledger, "call", watched)
    pieces = [each[:2] for each in platform.ledger.pieces(spec.job, 0, 60)]
    assert pieces == [(at, at + 1) for at in range(60)]
    assert set(found) == {5 * 400}, "one partial, and the next four"


def test_many_partials_of_a_split_are_merged_in_groups_and_keep_their_expiry(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partials, "COMPACT_AT_ONCE", 7)
    spec = opened(platform, 61)
    for kid in fan_out(platform, spec)[:60]:
        claim = platform.ledger.claim(spec.job, kid.id, kid.id, "w")
        partial = codec.pack((True, kid.lo, 1, 0))
        platform.ledger.finish(claim, Report(mid=kid.hi, done=1), partial)
    limit = platform.runtime.output_limit

    assert partials.compact_split(
        platform.ledger, spec.job, registry.get("sum"), limit, lo=0, hi=60
    )
    [(_, _, packed)] = platform.ledger.pieces(spec.job, 0, 61)
    assert codec.unpack(packed)[:3] == [True, sum(range(60)), 1]
    keys, store = platform.keys.of(spec.job), platform.store.client
    assert min(store.ttl(keys.pieces), store.ttl(keys.blobs)) > 29 * 86_400


def test_a_claim_knows_a_bounded_number_of_failed_items_and_leaves_the_rest(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (records, ledger):
        monkeypatch.setattr(module, "KNOWN_AT_ONCE", 5)
    texts = ["fails" if at % 3 == 0 else f"text {at}" for at in range(90)]
    spec = platform.submit(
        JobRequest(
            operation="unit_big_validated",
            items=texts,
            conditions={"validate_before_process": True},
            options={"continue_on_error": True},
        )
    )
    most, claim = [], platform.ledger.claim

    def watched(*args: Any, **named: Any) -> Any:
        claimed = claim(*args, **named)
        most.append(len(claimed.known_failed.ranges))
        return claimed

    monkeypatch.setattr(platform.ledger, "claim", watched)
    facts = platform.run(spec)

    assert (facts["state"], facts["done"], facts["failed"]) == ("succeeded", "60", "30")
    assert platform.output(spec) == [each for each in texts if each != "fails"]
    assert max(most) == 5
