"""A platform in one process: the real splitting, ledger, node and merge code, without Celery.

Messages go to a list instead of a broker, and the scripts of the ledger run on a real server, which
takes a tenth of the time of fakeredis. An item takes time on the clock of the harness. A seeded
`Random` makes every choice, so a failing run can be repeated.
"""

from __future__ import annotations

import atexit
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import cycle
from random import Random
from typing import Any

import redis

from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks.engine.node import run_node
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.spec import SCHEMA, JobSpec
from rlm_tasks.jobs.stored_items import ItemWriter
from rlm_tasks.ledger.at_work import held_nodes
from rlm_tasks.ledger.explain import explain
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.obstacles import Deployment
from rlm_tasks.ledger.partials import compact_split
from rlm_tasks.ledger.records import ROOT, Child, Split
from rlm_tasks.messaging.dispatch import group_id
from rlm_tasks.operations import registry
from rlm_tasks.requests import JobRequest, Priority
from rlm_tasks.settings.model import Settings
from rlm_tasks.testing import embedded
from scheduler.board import Departed, HostReport, Workers
from scheduler.slots import SlotBoard

DATABASES = 16
"""The databases of a server.  At most this many platforms can be in use at once."""
SERVERS = ExitStack()
"""Stops the server of the platforms; tests/unit/conftest.py closes it."""


@cache
def _databases() -> Iterator[redis.Redis]:
    """Start the server of all platforms of this process; return its databases in turn."""
    port = SERVERS.enter_context(embedded.server()).port
    SERVERS.callback(_databases.cache_clear)
    atexit.register(SERVERS.close)  # a test outside of tests/unit has no fixture that does it
    return cycle([redis.Redis(port=port, db=number) for number in range(DATABASES)])


def empty_database() -> redis.Redis:
    """Return a database without keys."""
    database = next(_databases())
    database.flushdb()
    return database


def host(worker: str = "unit", *queues: str, **about: Any) -> HostReport:
    """Return the report of a worker that consumes queues, by default those of all priorities."""
    names = queues or tuple(f"unit.{priority}" for priority in Priority)
    fields = {"slots": 2, "busy": 0, "active": {}, "schema": SCHEMA} | about
    return HostReport(worker, 0, 0.0, "", queues=names, **fields)


class Clock:
    """Time that passes only while an item runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Mailbox:
    """A stand-in for the dispatcher, which keeps messages until the harness runs them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.messages: list[tuple[str, str]] = []
        self.splits: list[Split] = []
        self.asked: list[str] = []
        self.sent = 0

    def _post(self, job: str, node: str) -> None:
        self.messages.append((job, node))
        self.sent += 1

    def send_root(self, some: Sequence[JobSpec], node: str) -> None:
        for spec in some:
            self._post(spec.job, node)

    def send_children(
        self, spec: JobSpec, children: Sequence[Child], splits: Sequence[Split], *, merges: bool
    ) -> None:
        self.splits += splits if merges else []
        for child in children:
            assert child.task != ""
            if child.wait_ms < 0:
                self._post(spec.job, child.id)

    def resend(self, spec: JobSpec, nodes: Sequence[str], *, merges: bool) -> None:
        for record in self._ledger.records(spec.job, nodes):
            self._post(spec.job, record.id)

    def ask_to_yield(self, queue: str) -> None:
        self.asked.append(queue)


class Platform:
    """Runs jobs to their end, in the order that the random generator chooses."""

    def __init__(
        self,
        seed: int = 0,
        *,
        slots: int = 4,
        settings: Settings | None = None,
        client: redis.Redis | None = None,
    ) -> None:
        registry.import_operations(())
        self.random, self.clock = Random(seed), Clock()
        self.settings = settings or Settings(namespace="unit")
        self.store = Store("redis://test", client=client or empty_database())
        self.keys = Keys(self.settings.namespace)
        self.ledger = Ledger(self.store, self.keys, self.settings.ledger)
        self.slots = SlotBoard(self.store, self.keys)
        self.mailbox = Mailbox(self.ledger)
        self.runtime = Runtime.build(
            self.settings,
            self.ledger,
            self.mailbox,  # type: ignore[arg-type]  # has the methods of the dispatcher
            shared=self.store,
            clock=self.clock,
        )
        self.runtime.worker = "unit"
        self.slot_count = slots
        self.queues = [f"unit.{priority}" for priority in Priority]

    def submit(self, request: JobRequest) -> JobSpec:
        """Open a job as the client does, without Celery."""
        job = str(uuid.UUID(int=self.random.getrandbits(128)))
        index, blocks = self.keys.staged(job, "token")
        writer = ItemWriter(self.store, index, blocks, max_item_bytes=1 << 20)
        source, n = source_of(request.items).write(writer)
        spec = JobSpec(
            job=job,
            operation=request.operation,
            source=source,
            n=n,
            shape=request.shape(self.settings.node.target_ms),
            queue=f"unit.{request.options.priority}",
            schema=SCHEMA,
            params=request.params,
            priority=request.options.priority,
            preempts=request.options.preempts(request.options.priority),
            kind=request.kind,
            continue_on_error=request.options.continue_on_error,
            error_threshold=request.options.error_threshold,
            skip_if_empty=request.conditions.skip_if_empty,
            validate=request.conditions.validate_before_process,
            early_termination_threshold=request.conditions.early_termination_threshold,
        )
        self.ledger.open([(spec, "token")], 3600)
        with self.runtime.delivery.making_room(
            spec.queue, [f"{job} {ROOT}"] if spec.preempts else (), freed=0
        ):
            self.mailbox.send_root([spec], ROOT)
        return spec

    def explain(self, job: str, *hosts: HostReport, departed: Sequence[Departed] = ()) -> str:
        """Return the explanation of a job, with these workers on the board."""
        facts, spec = self.ledger.facts(job), self.ledger.spec(job)
        deployment = Deployment(Workers(hosts, departed), {}, "redis://test", "celery -A shop")
        at_work = held_nodes(self.ledger, job, facts)
        now_ms = self.store.now_ms()
        return explain(facts, at_work, now_ms, spec, deployment, sweep_s=5.0)

    def step(self) -> None:
        """Deliver one message, sometimes twice, with some slots free."""
        free = self.random.randint(0, self.slot_count)
        self.store.call(self.slots.publish("unit", self.slot_count, free, self.queues))
        at = self.random.randrange(len(self.mailbox.messages))
        job, node = self.mailbox.messages.pop(at)
        if self.random.random() < 0.05:
            self.mailbox.messages.append((job, node))
        run_node(self.runtime, job, node)
        self._maybe_merge(job)

    def _maybe_merge(self, job: str) -> None:
        """Run some chord body, early or late; it must never matter."""
        if self.mailbox.splits and self.random.random() < 0.5:
            split = self.random.choice(self.mailbox.splits)
            assert group_id(job, split.id)
            spec = self.ledger.spec(job)
            assert spec is not None
            compact_split(
                self.ledger,
                job,
                registry.get(spec.operation),
                self.runtime.output_limit,
                lo=split.lo,
                hi=split.hi,
            )

    def run(self, spec: JobSpec, between: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Run until no message is left; return the facts of the job."""
        while self.mailbox.messages:
            self.step()
            between()
        return self.ledger.facts(spec.job)

    def output(self, spec: JobSpec) -> Any:
        """Return the unpacked answer, or the pages of a job without a merge."""
        from rlm_tasks.jobs import codec
        from rlm_tasks.ledger.partials import flattened, partials

        packed = self.store.client.hget(self.keys.of(spec.job).blobs, "output")
        if packed is not None:
            return codec.unpack(packed)
        return list(flattened(partials(self.ledger, spec.job, 0, spec.n)))
