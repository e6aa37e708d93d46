"""Turn the ledger's nodes into Celery messages: groups and chords, whose messages carry only ids.

Clients send first nodes by it, cuts send children, and `Delivery` sends nodes again.  A message is
a function of its node's record, so a copy has the same task id, group and index.  A header names
the body of its own chord only.  The enclosing chords are read when the body runs, so messages do
not grow with depth.  Begin with `Dispatcher.send_root` and `Dispatcher.send_children`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from celery import Celery
from kombu.messaging import Producer
from redis.exceptions import RedisError

from resilience.errors import StoreUnavailable
from rlm_tasks.jobs.spec import SCHEMA, JobSpec
from rlm_tasks.jobs.splitting import Fork, Leaf
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import Child, ChordSlot, Split
from rlm_tasks.messaging.broker import AWAY, with_connection
from rlm_tasks.messaging.broker_kinds import kind_of_backend
from rlm_tasks.messaging.transports import leave_old_primaries

logger = logging.getLogger(__name__)

NODE_TASK, MERGE_TASK = "rlm.node", "rlm.merge"
BATCH = 500
LONGEST_NAME = 100
MARKS_PER_GRACE = 4
"""A sender marks its progress this often in the time after which a message counts as late."""
CHORDS_LEFT, LATE_S = 8, 300
"""The counts of fewer chords are left to expire; late parts of the others come within LATE_S."""
ACQUIRE_S = 10
"""Longest wait for a connection while other threads of the process use all of them."""


def new_id() -> str:
    """Return an id for a node or a split, unique within its job."""
    return secrets.token_hex(8)


def legible(name: object) -> str:
    """Return a name or an id of a message as printable text, cut after 100 characters."""
    text = "".join(each if each.isprintable() else "?" for each in str(name)[:LONGEST_NAME])
    return text if len(str(name)) <= LONGEST_NAME else f"{text}..."


def with_ids(fork: Fork, job: str, slot: ChordSlot, why: str) -> tuple[list[Split], list[Child]]:
    """Return the splits and children of a plan, each with an id and the chord slot that it fills.

    As with Celery's own ``replace``, the outermost body takes over the task id and the slot of the
    node that is cut.
    """
    splits: list[Split] = []
    children: list[Child] = []

    def visit(part: Fork | Leaf, slot: ChordSlot) -> None:
        if isinstance(part, Leaf):
            id = new_id()
            children.append(
                Child(
                    id=id,
                    lo=part.lo,
                    hi=part.hi,
                    depth=part.depth,
                    split=slot.split,
                    index=slot.index,
                    task=slot.task or f"{job}.{id}",
                    why=why,
                )
            )
            return
        id = new_id()
        splits.append(
            Split(
                id=id,
                lo=part.lo,
                hi=part.hi,
                split=slot.split,
                index=slot.index,
                task=slot.task or f"{job}.{id}",
                size=len(part.parts),
            )
        )
        for index, inner in enumerate(part.parts):
            visit(inner, ChordSlot(id, index))

    visit(fork, slot)
    return splits, children


def group_id(job: str, split: str) -> str:
    """Return the Celery group id of a split."""
    return f"{job}-{split}"


def body_of(job: str, queue: str, split: Split) -> dict[str, Any]:
    """Return the signature of a chord's body, without the chords that enclose it."""
    return {
        "task": MERGE_TASK,
        "args": [job, split.id],
        "kwargs": {},
        "options": {"task_id": split.task, "queue": queue, "ignore_result": True},
        "subtask_type": None,
        "immutable": True,
    }


def header_of(spec: JobSpec, message: int, sent_at: float) -> dict[str, Any]:
    """Return the header of a node's message.

    By it a worker knows, before it claims, whether it can run the node, and which copy it received.
    The send time (seconds, by the server's clock) gives the age of the oldest message in a queue.
    """
    return {
        "rlm": {
            "schema": spec.schema,
            "operation": spec.operation,
            "version": spec.version,
            "message": message,
            "at": round(sent_at, 3),
        }
    }


class Header(NamedTuple):
    """The header of a node's message, as far as it can be trusted."""

    schema: int
    operation: str
    version: int
    message: int


def read_header(value: object) -> Header:
    """Return the header of a node's message; a wrong or missing field has the default.

    Anybody who reaches the broker may have written it.
    """
    fields = value if isinstance(value, dict) else {}
    operation = fields.get("operation")
    return Header(
        schema=_count(fields.get("schema"), SCHEMA),
        operation=operation if isinstance(operation, str) else "",
        version=_count(fields.get("version"), 1),
        message=_count(fields.get("message"), 0),
    )


def _count(value: object, default: int) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**31 else default


def is_id(value: object) -> bool:
    """Whether a value may be an id: printable text of at most 200 characters."""
    return isinstance(value, str) and 0 < len(value) <= 2 * LONGEST_NAME and value.isprintable()


class _Message(NamedTuple):
    """A message of a node: its number among them, and the chord that it begins, if any."""

    spec: JobSpec
    node: str
    number: int
    slot: ChordSlot
    chord: Split | None = None


class _Once(Producer):
    """A producer that tries once."""

    def publish(self, *args: Any, **options: Any) -> Any:
        return super().publish(*args, **options | {"retry": False})  # type: ignore[no-untyped-call]  # kombu is partly typed


class Dispatcher:
    """Send nodes to their queue."""

    def __init__(self, app: Celery, ledger: Ledger) -> None:
        self._app, self._ledger, self._clock = app, ledger, ledger.clock
        leave_old_primaries()

    def send_root(self, specs: Sequence[JobSpec], node: str) -> None:
        """Send the first node of each job."""
        self._publish(_Message(spec, node, 0, ChordSlot(task=spec.job)) for spec in specs)

    def send_children(
        self, spec: JobSpec, children: Sequence[Child], splits: Sequence[Split], *, merges: bool
    ) -> None:
        """Send the children that a cut has registered; a sweep sends parked ones when due.

        Without a merge, a split is a group and needs no chord.
        """
        merges = merges and self._counts_chords()
        if merges and splits:
            self._set_sizes(spec.job, splits)
        bodies = {split.id: split for split in splits} if merges else {}
        slots = {each.id: ChordSlot(each.split, each.index, each.task) for each in children}
        self._publish(
            _Message(spec, child.id, 0, slots[child.id], bodies.get(child.split))
            for child in children
            if child.wait_ms < 0
        )

    def resend(self, spec: JobSpec, nodes: Sequence[str], *, merges: bool) -> None:
        """Send the messages of a job's registered nodes again, from their records."""
        records = self._ledger.records(spec.job, nodes)
        merges = merges and self._counts_chords()
        wanted = {record.slot.split for record in records if record.slot.split} if merges else set()
        bodies = {id: self._ledger.split(spec.job, id) for id in wanted}
        self._publish(
            _Message(spec, each.id, each.message, each.slot, bodies.get(each.slot.split))
            for each in records
        )

    def ask_to_yield(self, queue: str) -> None:
        """Notify workers that urgent work waits in a queue.

        A worker that the broadcast does not reach finds it in Redis within a second.
        """
        try:
            self.broadcast("rlm_yield", queue=queue)
        except AWAY as error:
            logger.info(
                "Workers were not asked to yield; they notice it within a second: %s", error
            )

    def broadcast(self, command: str, **arguments: Any) -> None:
        """Broadcast a command to all workers.  Raises the errors in `broker.AWAY`."""

        def cast(connection: Any) -> None:
            # kombu's own broadcast repeats the message for ever while the broker is away.
            mailbox = self._app.control.mailbox(connection)
            once = _Once(connection, auto_declare=False)  # type: ignore[no-untyped-call]
            mailbox._publish(command, arguments, producer=once)

        with self._app.pool.acquire(block=True, timeout=ACQUIRE_S) as connection:
            with_connection(connection, cast)

    def _counts_chords(self) -> bool:
        """Whether the app's result backend counts chord parts; else the root merge merges all."""
        return kind_of_backend(self._app.backend).counts_chords

    def forget_chords(self, job: str, splits: Sequence[str]) -> None:
        """Delete the counts of the chords of a job that has ended; late parts count no more.

        The counts of few chords are left to expire, so that a small job costs no call.
        """
        if len(splits) < CHORDS_LEFT or not self._counts_chords():
            return
        backend = self._app.backend
        pipe = backend.client.pipeline(transaction=False)
        for split in splits:
            counts, claim = (
                [backend.get_key_for_group(group_id(job, split), part) for part in parts]
                for parts in ((".s", ".j", ".t", ".d"), (".c",))
            )
            pipe.unlink(*counts)
            pipe.set(claim[0], "done", ex=LATE_S)
        try:
            pipe.execute()
        except (RedisError, OSError) as error:
            logger.info("The counts of the chords of job %s are left to expire: %s", job, error)

    def _set_sizes(self, job: str, splits: Iterable[Split]) -> None:
        backend = self._app.backend
        pipe = backend.client.pipeline(transaction=False)
        for split in splits:
            key = backend.get_key_for_group(group_id(job, split.id), ".s")
            pipe.set(key, split.size, ex=backend.chord_expires or None)
        try:
            pipe.execute()
        except (RedisError, OSError) as error:
            logger.warning(
                "The result backend does not count the chords of job %s (%s); its root merge "
                "does their work",
                job,
                error,
            )

    def _publish(self, messages: Iterable[_Message]) -> None:
        messages = list(messages)
        if not messages:
            return
        try:
            with self._app.producer_pool.acquire(block=True, timeout=ACQUIRE_S) as producer:
                with_connection(
                    producer.connection,
                    lambda connection: self._send_all(producer, connection, messages),
                )
        except AWAY as error:
            logger.warning(
                "%d node messages of job %s were not sent (%s); the sweep sends them",
                len(messages),
                messages[0].spec.job,
                error,
            )

    def _send_all(self, producer: Any, connection: Any, messages: Sequence[_Message]) -> None:
        producer.revive(connection)
        if len(messages) == 1:
            self._send(producer, messages[0])
            return
        clock, every_s = self._ledger.store.clock, self._ledger.settings.grace / MARKS_PER_GRACE
        marked_at = clock()
        with producer.batch(BATCH):
            for message in messages:
                self._send(producer, message)
                if clock() - marked_at > every_s:
                    self._mark_sending(messages)
                    marked_at = clock()

    def _mark_sending(self, messages: Sequence[_Message]) -> None:
        """Tell the ledger that a large cut is still being sent, so that no node counts as lost.

        When this process dies, the grace of the rest has just begun.
        """
        nodes: dict[str, list[str]] = {}
        for each in messages:
            nodes.setdefault(each.spec.job, []).append(each.node)
        try:
            for job, ids in nodes.items():
                self._ledger.sending(job, ids)
        except StoreUnavailable as error:
            logger.info("The sweep may send copies of nodes that are being sent: %s", error)

    def _send(self, producer: Any, message: _Message) -> None:
        spec, slot, job = message.spec, message.slot, message.spec.job
        options: dict[str, Any] = {"headers": header_of(spec, message.number, self._clock())}
        if slot.split:
            options |= {"group_id": group_id(job, slot.split), "group_index": slot.index}
        if message.chord is not None:
            options["chord"] = body_of(job, spec.queue, message.chord)
        self._app.send_task(
            NODE_TASK,
            [job, message.node],
            task_id=slot.task or job,
            queue=spec.queue,
            root_id=job,
            parent_id=job,
            ignore_result=True,
            producer=producer,
            retry=False,
            **options,
        )
