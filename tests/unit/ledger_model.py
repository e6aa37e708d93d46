"""The ledger against an oracle in plain Python: claims, finishes, duplicates, expiries and sweeps.

They come in any order. Time does not pass by itself: leases are long, and a rule lets one run out.
A subclass gives the Redis that it runs on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import MERGE, ROOT, Child, Claim, Report
from rlm_tasks.requests import JobRequest
from rlm_tasks.settings.sections import LedgerSettings

LONG_S = 10_000.0
GRACE_S = 1000.0
QUEUED, RUNNING, PARKED, DONE, CUT, SKIPPED = "q", "r", "p", "d", "c", "k"


@dataclass
class Node:
    """The oracle's record of a node."""

    lo: int
    hi: int
    state: str = QUEUED
    token: str = ""  # the token of its last holder
    lapsed: bool = False  # its lease has run out, or its parking time has come
    lost: bool = False  # swept from its holder, and not claimed since
    aged: bool = False  # its message was sent a long time ago
    epoch: int = 0
    tries: int = 0  # the number of failures of its first item
    kids: list[str] = field(default_factory=list)

    def is_held_by(self, token: str) -> bool:
        """Return whether a token may still act on the node."""
        return self.token == token and (
            self.state == RUNNING or (self.state == QUEUED and self.lost)
        )


class LedgerMachine(RuleBasedStateMachine):
    """One job, driven at random; every answer is compared with that of the oracle."""

    connect: ClassVar[staticmethod[[], redis.Redis]]

    @initialize(n=st.integers(1, 24))
    def opened(self, n: int) -> None:
        """Open the job."""
        client = self.connect()
        client.flushdb()
        keys = Keys("model")
        settings = LedgerSettings(
            lease_s=LONG_S, sweep_s=LONG_S, grace_s=GRACE_S, stop_grace_s=LONG_S, death_limit=3
        )
        self.ledger = Ledger(Store("redis://model", client=client), keys, settings)
        shape = JobRequest(operation="sum", items=range(n)).shape(1000.0)
        self.spec = JobSpec("job", "sum", RangeSource(0, 1), n, shape, "queue")
        assert self.ledger.open([(self.spec, "t")], 3600) == [True]
        assert self.ledger.open([(self.spec, "t")], 3600) == [False], "a job is opened once"
        self.keys, self.n = keys.of("job"), n
        self.nodes: dict[str, Node] = {ROOT: Node(0, n)}
        self.claims: list[Claim] = []
        self.tokens = 0
        self.stopped = False
        self.state = "pending"
        self.done: list[tuple[int, int]] = []
        self.deaths: dict[int, int] = {}
        self.merge_last_calls = 0

    # --- workers ------------------------------------------------------------------------------

    def pick(self, data: st.DataObject) -> str:
        """Choose a node."""
        return data.draw(st.sampled_from(list(self.nodes)), "node")

    @precondition(lambda self: self.state != "closed")
    @rule(data=st.data())
    def claim_open(self, data: st.DataObject) -> None:
        """Deliver the message of a node that waits for one."""
        waiting = [id for id, node in self.nodes.items() if node.state == QUEUED]
        if waiting:
            self.message_arrives(data.draw(st.sampled_from(waiting), "node"), False)

    @rule(data=st.data(), again=st.booleans())
    def claim(self, data: st.DataObject, again: bool) -> None:
        """Deliver some message: the first, a copy, or a repeated claim."""
        self.message_arrives(self.pick(data), again)

    def message_arrives(self, id: str, again: bool) -> None:
        """Claim a node, and compare the answer with the expected one."""
        node = self.nodes[id]
        token = node.token if again and node.token else self.new_token()
        [record] = self.ledger.records("job", [id])
        answer = self.ledger.claim("job", id, token, "worker", record.message)
        assert answer.answer == self.expected_claim(id, node, token)
        if answer.answer == "cut":
            assert set(answer.waiting) == {
                kid for kid in node.kids if self.nodes[kid].state == QUEUED
            }
        if (
            answer.answer == "closed"
            and self.state not in ("closed",)
            and node.state in (QUEUED, PARKED, RUNNING)
        ):
            self.skip(node)
            self.skip_waiting()
        if answer.answer == "run":
            if not (node.state == RUNNING and node.token == token):
                node.epoch += 1
            node.state, node.token, node.lapsed, node.lost, node.aged = (
                RUNNING,
                token,
                False,
                False,
                False,
            )
            assert (answer.epoch, answer.lo, answer.hi, answer.tries) == (
                node.epoch,
                node.lo,
                node.hi,
                node.tries,
            )
            self.state = "merging" if id == MERGE else "running"
            self.claims.append(answer)

    def expected_claim(self, id: str, node: Node, token: str) -> str:
        """Return the answer that CLAIM must give."""
        if self.state == "closed":
            return "closed"
        if node.state in (DONE, SKIPPED):
            return "done"
        if node.state == CUT:
            return "cut"
        if node.state == RUNNING and node.token != token and not node.lapsed:
            return "busy"
        if node.state == PARKED and not node.lapsed:
            return "parked"
        return "closed" if self.stopped and id != MERGE else "run"

    @precondition(lambda self: self.state != "closed")
    @rule(data=st.data(), parts=st.integers(0, 4))
    def finish_held(self, data: st.DataObject, parts: int) -> None:
        """Finish a node as its holder."""
        held = [
            each
            for each in self.claims
            if each.node != MERGE and self.nodes[each.node].is_held_by(each.token)
        ]
        if held:
            self.finish_with_parts(data, data.draw(st.sampled_from(held), "claim"), parts)

    @precondition(lambda self: any(claim.node != MERGE for claim in self.claims))
    @rule(data=st.data(), parts=st.integers(0, 3))
    def finish(self, data: st.DataObject, parts: int) -> None:
        """Finish a node as an earlier or present holder, or a second time."""
        self.finish_with_parts(
            data,
            data.draw(
                st.sampled_from([each for each in self.claims if each.node != MERGE]), "claim"
            ),
            parts,
        )

    def finish_with_parts(self, data: st.DataObject, claim: Claim, parts: int) -> None:
        """Finish a node with some parts left, and compare the answer with the expected one."""
        node = self.nodes[claim.node]
        rest = min(parts, node.hi - node.lo)
        mid = node.hi if rest == 0 else data.draw(st.integers(node.lo, node.hi - rest), "mid")
        edges = [
            mid,
            *sorted(
                data.draw(
                    st.sets(
                        st.integers(mid + 1, node.hi - 1), min_size=rest - 1, max_size=rest - 1
                    ),
                    "edges",
                )
                if rest > 1
                else []
            ),
            node.hi,
        ]
        kids = [
            Child(f"n{len(self.nodes) + i}", a, b, 1, "", i, "task", "")
            for i, (a, b) in enumerate(itertools.pairwise(edges))
            if a < b
        ]
        if kids and data.draw(st.booleans(), "the first has to wait"):
            kids[0].wait_ms, kids[0].tries = (
                int(LONG_S * 1000),
                data.draw(st.integers(0, 3), "tries"),
            )
        report = Report(mid=mid, done=mid - node.lo, kids=kids)
        finished = self.ledger.finish(claim, report, b"partial" if mid > node.lo else b"")

        if node.state in (DONE, CUT) and node.token == claim.token:
            assert finished.answer == "ok", "the same caller repeats it, as if the answer was lost"
        elif not node.is_held_by(claim.token):
            assert finished.answer == "stale"
        else:
            assert finished.answer == "ok"
            self.finished(claim, node, mid, kids, finished.outcome)

    def finished(self, claim: Claim, node: Node, mid: int, kids: list[Child], outcome: str) -> None:
        """Apply a finish to the oracle."""
        if mid > node.lo:
            self.done.append((node.lo, mid))
        registered = [] if self.stopped else kids
        node.state, node.lost = (CUT if registered else DONE), False
        node.kids = [kid.id for kid in registered]
        for kid in registered:
            self.nodes[kid.id] = Node(
                kid.lo, kid.hi, PARKED if kid.wait_ms >= 0 else QUEUED, tries=kid.tries
            )
        if self.stopped:
            self.skip_waiting()
        if self.unfinished():
            assert outcome == ""
        elif self.stopped:
            assert outcome == "closed"
            self.state = "closed"
        else:
            assert outcome == MERGE
            self.merge_last_calls += 1
            self.state = "merging"
            self.nodes[MERGE] = Node(0, self.n, RUNNING, claim.token, epoch=1)
            self.claims.append(Claim("run", "job", MERGE, claim.token))

    @precondition(lambda self: any(claim.node == MERGE for claim in self.claims))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """Close the job as an earlier or present holder of the root merge."""
        claim = data.draw(
            st.sampled_from([each for each in self.claims if each.node == MERGE]), "claim"
        )
        merge = self.nodes[MERGE]
        ended = self.ledger.close(
            "job", claim.token, "succeeded", b"answer " + claim.token.encode()
        ).state
        if self.state != "closed" and merge.is_held_by(claim.token):
            assert ended == "succeeded"
            self.state, merge.state = "closed", DONE
            self.answer = claim.token
        else:
            assert ended == ""

    @precondition(lambda self: any(node.lost for node in self.nodes.values()))
    @rule(data=st.data())
    def beat_late(self, data: st.DataObject) -> None:
        """Send a heartbeat for a holder whose lease ran out."""
        lost = [each for each in self.claims if self.nodes[each.node].lost]
        self.beats_for(data.draw(st.sampled_from(lost), "claim"))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        """Send a heartbeat for an earlier or present holder of a node."""
        self.beats_for(data.draw(st.sampled_from(self.claims), "claim"))

    def beats_for(self, claim: Claim) -> None:
        """Send a heartbeat; it renews a lease that no other holder has taken."""
        node = self.nodes[claim.node]
        self.ledger.beat([("job", claim.node, claim.token)])
        if node.is_held_by(claim.token):
            node.state, node.lapsed, node.lost = RUNNING, False, False

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), dies=st.booleans())
    def release(self, data: st.DataObject, dies: bool) -> None:
        """Release a node whose process died, or just stopped."""
        claim = data.draw(st.sampled_from(self.claims), "claim")
        node = self.nodes[claim.node]
        item = node.lo if claim.node != MERGE and dies else -1
        released = self.ledger.release(
            "job", claim.node, claim.token, item, "SIGKILL" if dies else ""
        )
        assert released == (self.state != "closed" and node.is_held_by(claim.token))
        if released:
            node.state, node.token, node.lost, node.lapsed, node.aged = (
                QUEUED,
                "",
                False,
                False,
                False,
            )
            if item >= 0:
                self.deaths[item] = self.deaths.get(item, 0) + 1

    @precondition(lambda self: any(claim.node != MERGE for claim in self.claims))
    @rule(data=st.data(), tries=st.integers(0, 3))
    def park(self, data: st.DataObject, tries: int) -> None:
        """Park a node as an earlier or present holder."""
        claim = data.draw(
            st.sampled_from([each for each in self.claims if each.node != MERGE]), "claim"
        )
        node = self.nodes[claim.node]
        self.ledger.park(claim, int(LONG_S * 1000), "a test says so", tries)
        if node.is_held_by(claim.token) and self.stopped:
            node.lost = False
            self.skip(node)
            self.skip_waiting()
        elif node.is_held_by(claim.token):
            node.tries = tries
            node.state, node.lost, node.lapsed, node.aged = PARKED, False, False, False

    @rule(data=st.data())
    def call(self, data: st.DataObject) -> None:
        """Unpark a node, which may be parked or in any other state."""
        id = self.pick(data)
        node = self.nodes[id]
        called = self.ledger.unpark("job", id)
        assert called == (node.state == PARKED and self.state != "closed")
        if called:
            node.state, node.lapsed, node.aged = QUEUED, False, False

    # --- time ---------------------------------------------------------------------------------

    @rule(data=st.data())
    def lapse(self, data: st.DataObject) -> None:
        """Let a lease run out, or the time of a parked node come."""
        timed = [id for id, node in self.nodes.items() if node.state in (RUNNING, PARKED)]
        if timed and self.state != "closed":
            id = data.draw(st.sampled_from(timed), "node")
            assert (
                self.ledger.store.client.zadd(self.keys.due, {id: 1}, xx=True, ch=True)
                or self.nodes[id].lapsed
            )
            self.nodes[id].lapsed = True

    @rule(data=st.data())
    def age(self, data: st.DataObject) -> None:
        """Let a message be in transit for a long time."""
        queued = [id for id, node in self.nodes.items() if node.state == QUEUED]
        if queued and self.state != "closed":
            id = data.draw(st.sampled_from(queued), "node")
            self.ledger.store.client.zadd(self.keys.waiting, {id: 1}, xx=True)
            self.nodes[id].aged = True

    @rule()
    def sweep(self) -> None:
        """Sweep overdue nodes."""
        before = self.state
        swept = self.ledger.sweep("job")
        sent = list(swept.send)
        assert len(sent) == len(set(sent)), "no node is sent twice"
        if before == "closed":
            assert sent == []
            return
        if self.stopped and before != "merging":
            self.skip_waiting()
        overdue = {
            id for id, node in self.nodes.items() if node.state in (RUNNING, PARKED) and node.lapsed
        }
        aged = {id for id, node in self.nodes.items() if node.state == QUEUED and node.aged}
        assert overdue <= set(sent) <= overdue | aged
        if not overdue and aged and self.state != "closed":
            # One or all are sent, depending on the messages that have arrived since. Without
            # any the job would hang.
            waited = self.ledger.facts("job")
            assert sent or max(int(waited["claimed_ms"]), int(waited["probed_ms"])) > 0
        for id in sent:
            node = self.nodes[id]
            node.lost = node.lost or node.state == RUNNING
            node.state, node.lapsed, node.aged = QUEUED, False, False

    @precondition(lambda self: self.state not in ("closed", "merging"))
    @rule(dice=st.integers(0, 9))
    def cancel(self, dice: int) -> None:
        """Cancel the job."""
        if dice:
            return  # rarely, so that other rules run, too
        self.ledger.stop("job", "cancelled")
        self.stopped = True
        self.skip_waiting()
        if not self.unfinished():
            self.state = "closed"

    # --- invariants ---------------------------------------------------------------------------

    def skip(self, node: Node) -> None:
        """Mark a node as skipped."""
        node.state = SKIPPED
        if not self.unfinished() and self.stopped:
            self.state = "closed"

    def skip_waiting(self) -> None:
        """Skip the waiting nodes of a job that ends, as any caller does."""
        for id, node in self.nodes.items():
            if id != MERGE and node.state in (QUEUED, PARKED):
                self.skip(node)

    def new_token(self) -> str:
        """Return an unused token."""
        self.tokens += 1
        return f"token-{self.tokens}"

    def unfinished(self) -> list[Node]:
        """Return the nodes of the tree that still own a range."""
        return [
            node
            for id, node in self.nodes.items()
            if id != MERGE and node.state in (QUEUED, RUNNING, PARKED)
        ]

    @invariant()
    def ranges_tile(self) -> None:
        """The done, open and skipped ranges tile [0, n)."""
        open_ = [(node.lo, node.hi) for node in self.unfinished()]
        facts = self.ledger.facts("job")
        covered = sorted([*self.done, *open_])
        if facts["state"] != "succeeded":
            # An answer that covers the whole range replaces its parts.
            assert sorted(self.ledger.ranges("job")) == sorted(self.done)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(covered)), "no overlap"
        total = sum(hi - lo for lo, hi in covered)
        assert total + int(facts["skipped"]) == self.n, "no gap"
        assert int(facts["done"]) == sum(hi - lo for lo, hi in self.done)

    @invariant()
    def pending_counts_open_nodes(self) -> None:
        """The job ends when nothing is pending, so the counter must be right."""
        facts = self.ledger.facts("job")
        merge = self.nodes.get(MERGE)
        open_merge = merge is not None and merge.state != DONE
        assert int(facts["pending"]) == len(self.unfinished()) + int(open_merge)
        assert (facts["state"] in ("succeeded", "cancelled")) == (self.state == "closed")
        assert self.merge_last_calls <= 1, "one caller at most is the last"

    @invariant()
    def every_open_node_is_findable(self) -> None:
        """A node that waits for a message or a time is in exactly one index, so none can be
        forgotten.
        """
        if self.state == "closed":
            return
        client = self.ledger.store.client
        facts = self.ledger.facts("job")
        parked = [id for id, node in self.nodes.items() if node.state == PARKED]
        assert int(facts["parked"]) == len(parked), "the sums by state are right"
        assert sum(int(n) for name, n in facts.items() if name.startswith("why:")) == len(parked)
        due = {id.decode() for id in client.zrange(self.keys.due, 0, -1)}
        waiting = {id.decode() for id in client.zrange(self.keys.waiting, 0, -1)}
        assert due == {id for id, node in self.nodes.items() if node.state in (RUNNING, PARKED)}
        assert waiting == {id for id, node in self.nodes.items() if node.state == QUEUED}
        assert client.zscore(self.ledger.keys.due, "job") is not None

    def teardown(self) -> None:
        """Let one healthy worker run the rest: the job ends with every item counted."""
        if not hasattr(self, "ledger"):
            return
        for _ in range(10_000):
            if self.state == "closed":
                break
            self.drain_one()
        facts = self.ledger.facts("job")
        assert facts["state"] == ("cancelled" if self.stopped else "succeeded")
        assert int(facts["done"]) + int(facts["skipped"]) == self.n
        if not self.stopped:
            assert facts["done"] == str(self.n)

    def drain_one(self) -> None:
        """Claim and finish one open node, whatever its holder."""
        id, node = next(
            (id, node) for id, node in self.nodes.items() if node.state in (QUEUED, RUNNING, PARKED)
        )
        if node.state in (RUNNING, PARKED):
            self.ledger.store.client.zadd(self.keys.due, {id: 1}, xx=True)
            node.lapsed = True
        claim = self.ledger.claim("job", id, self.new_token(), "worker")
        if claim.answer == "closed":
            self.skip(node)
            self.skip_waiting()
            return
        assert claim.answer == "run"
        node.state, node.token = RUNNING, claim.token
        if id == MERGE:
            assert (
                self.ledger.close("job", claim.token, "succeeded", b"answer").state == "succeeded"
            )
            self.state, node.state = "closed", DONE
            return
        finished = self.ledger.finish(
            claim, Report(mid=node.hi, done=node.hi - node.lo), b"partial"
        )
        assert finished.answer == "ok"
        self.finished(claim, node, node.hi, [], finished.outcome)
