"""How many jobs may be at work at once: who gets a place, who is turned away, and when a place is
free again.
"""

from __future__ import annotations

import threading

import msgspec
import pytest

from resilience.degradation import Level
from resilience.keys import Keys
from rlm_tasks import JobRequest
from rlm_tasks.engine.node import _not_taken_in, run_node
from rlm_tasks.ledger.records import ROOT
from scheduler.admission import WaitingRoom
from scheduler.monitor import CALLED_PER_SLOT
from tests.unit.harness import Platform
from tests.unit.scheduler.test_monitor import Platform as Monitored
from tests.unit.world import World, world

__all__ = ["world"]


def room(world: World, max_jobs: int) -> WaitingRoom:
    return WaitingRoom(world.store(), Keys("unit"), max_jobs)


def ended(world: World, *jobs: str) -> None:
    """Do as CLOSE does: the job is no longer in the index of open ones."""
    world.client().zrem(Keys("unit").due, *jobs)


def test_so_many_have_a_place_and_the_next_is_told_to_come_back(world: World) -> None:
    door = room(world, 2)

    assert [door.crowded(job, "normal") for job in ("a", "b")] == [None, None]
    refused = door.crowded("c", "normal")
    assert refused is not None
    assert (refused.code, refused.retry_after_s) == ("QUEUE_FULL", 5.0)
    assert str(refused) == "jobs: as many are at work as may be: 2; come back in 5 s"
    assert door.crowded("a", "normal") is None, "who has a place keeps it"
    assert door.places() == 0


def test_a_place_is_free_when_its_job_has_ended_was_given_back_or_was_never_opened(
    world: World,
) -> None:
    door = room(world, 3)
    assert [door.crowded(job, "low") for job in "abc"] == [None] * 3

    ended(world, "b")
    door.leave(["c"])
    assert door.places() == 2
    assert world.client().zscore(Keys("unit").due, "a") == (world.now + 60) * 1000, (
        "a sweep drops what was not opened by then"
    )


def test_critical_jobs_are_neither_refused_nor_counted(world: World) -> None:
    door = room(world, 1)

    assert [door.crowded(str(each), "critical") for each in range(5)] == [None] * 5
    assert door.places() == 1


def test_without_a_bound_nobody_asks(world: World) -> None:
    store = world.store()
    door = WaitingRoom(store, Keys("unit"))

    assert [door.crowded(str(each), "low") for each in range(500)] == [None] * 500
    assert door.places() > 10**6
    assert store.round_trips == 0


def test_of_many_who_ask_at_once_exactly_as_many_get_a_place(world: World) -> None:
    granted: list[str] = []

    def ask(client: int) -> None:
        door = room(world, 50)
        granted.extend(
            job
            for job in (f"{client}-{each}" for each in range(20))
            if door.crowded(job, "normal") is None
        )

    clients = [threading.Thread(target=ask, args=(each,)) for each in range(8)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert len(granted) == 50


def test_a_job_that_waits_begins_when_there_is_a_place(world: World) -> None:
    platform = Platform()
    platform.runtime.room = WaitingRoom(platform.store, platform.keys, 1)
    first = platform.submit(JobRequest(operation="sum", items=range(3)))
    spec = msgspec.structs.replace(first, job="later")
    assert _not_taken_in(platform.runtime, first) == ""

    assert _not_taken_in(platform.runtime, spec) == "as many are at work as may be: 1"
    platform.mailbox.messages.clear()
    while platform.ledger.facts(first.job)["state"] != "succeeded":
        for node in (ROOT, "merge"):
            run_node(platform.runtime, first.job, node)
    assert _not_taken_in(platform.runtime, spec) == ""


@pytest.mark.parametrize(
    ("at_work", "called"), [(0, 6), (1, 5), (6, 0), (9, 0)]
)  # 9: the bound was lowered
def test_the_monitor_calls_no_more_than_there_are_places(
    world: World, at_work: int, called: int
) -> None:
    monitored = Monitored(world)
    others = room(world, 100)
    assert all(others.crowded(f"busy-{each}", "normal") is None for each in range(at_work))
    monitored.host(level=Level.NORMAL, slots=10)
    monitored.waiting("unit.normal", *(f"job-{each:02} root" for each in range(20)))
    monitored.waiting("unit.critical", "urgent root")
    monitor, store = monitored.monitor()
    monitor._room = WaitingRoom(store, monitored.keys, 6)

    monitored.look(monitor)

    assert CALLED_PER_SLOT * 10 > 20
    assert monitored.woken == ["urgent root", *(f"job-{each:02} root" for each in range(called))]


def test_who_waits_keeps_its_turn(world: World) -> None:
    door = room(world, 1)
    door.enter("unit.normal", {"a root": 1})
    door.enter("unit.normal", {"b root": 2})
    door.enter("unit.normal", {"a root": 3})

    assert door.call("unit.normal", 2) == ["a root", "b root"]
