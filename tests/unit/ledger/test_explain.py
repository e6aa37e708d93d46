"""Explanations of jobs: each cause has its own sentence, with what to do."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rlm_tasks.jobs.spec import SCHEMA, JobSpec
from rlm_tasks.ledger.obstacles import Deployment, obstacle, waiting
from rlm_tasks.requests import JobRequest
from scheduler.board import Departed, HostReport, Workers
from scheduler.queues import QueueReport
from tests.unit.harness import Platform, host

QUEUE, COMMAND, BROKER = "unit.normal", "celery -A shop", "redis://broker/1"


@pytest.fixture
def platform() -> Platform:
    """A platform whose messages are not delivered."""
    return Platform()


@pytest.fixture
def spec(platform: Platform) -> JobSpec:
    """An open job that no worker has begun."""
    return platform.submit(JobRequest(operation="sum", items=[1, 2, 3]))


def around(
    *live: HostReport, departed: tuple[Departed, ...] = (), **queues: QueueReport
) -> Deployment:
    found = {name.replace("_", "."): report for name, report in queues.items()}
    return Deployment(Workers(live, departed), found, BROKER, COMMAND)


def deaf(name: str, seconds: float) -> HostReport:
    return replace(host(name), queues=(), broker="redis://:***@b/2", deaf_s=seconds)


@pytest.mark.parametrize(
    ("deployment", "text"),
    [
        (
            around(),
            "Nobody works on it: no worker reports. Type: celery -A shop worker; if one runs, it "
            "needs the same RLM_REDIS_URL and RLM_NAMESPACE.",
        ),
        (
            around(departed=(Departed(host("w1"), 74.2, stopped=False),)),
            "Nobody works on it: worker w1 was last heard 74 s ago, and no other worker "
            "consumes queue unit.normal. Type: celery -A shop worker",
        ),
        (
            around(departed=(Departed(host("w1"), 720, stopped=True),)),
            "Nobody works on it: worker w1 was stopped 12 min ago, and no other worker "
            "consumes queue unit.normal. Type: celery -A shop worker",
        ),
        (
            around(
                host("w2", "unit.high"), departed=(Departed(host("w1", QUEUE), 3, stopped=False),)
            ),
            "Nobody works on it: worker w1 was last heard 3 s ago, and no other worker consumes "
            "queue unit.normal. Type: celery -A shop worker -Q unit.normal",
        ),
        (
            around(host("w1", "unit.high"), host("w2", "unit.low")),
            "Nobody works on it: no worker consumes queue unit.normal; workers w1 and w2 consume "
            "unit.high and unit.low. Type: celery -A shop worker -Q unit.normal",
        ),
        (
            around(deaf("w1", 12.3)),
            "Nobody works on it: worker w1 has consumed no queue for 12 s: the connection to the "
            "broker (redis://:***@b/2) may be lost.",
        ),
        (
            around(deaf("w1", 1.3), deaf("w2", 40)),
            "Nobody works on it: worker w1 connects to the broker (redis://:***@b/2), and consumes "
            "no queue yet.",
        ),
        (
            around(
                replace(host("w1", draining=True), queues=(), drained=(QUEUE,)), host("w2", "q")
            ),
            "Nobody works on it: worker w1 drains, and takes no more work. If nobody stops it, "
            "type: celery -A shop control rlm_resume",
        ),
        (
            around(host("w1", draining=True)),
            "Nobody works on it: worker w1 drains, and takes no more work. If nobody stops it, "
            "type: celery -A shop control rlm_resume",
        ),
        (
            Deployment(Workers([host("w1")], []), None, BROKER, COMMAND),
            "The broker does not answer, so no message reaches a worker.",
        ),
        (
            around(host("w1", operations={"other": 1})),
            "No worker of queue unit.normal knows operation 'sum': set RLM_OPERATIONS of worker w1 "
            "to rlm_tasks.operations.builtin, and restart.",
        ),
        (around(host("w1", operations={"other": 1}), host("w2", operations={"sum": 1})), ""),
        (around(host("w1", operations={"other": 1}), host("an old release")), ""),
        (
            around(host("w1", schema=SCHEMA - 1)),
            f"Its form (schema {SCHEMA}) is newer than worker w1 can read: install this release "
            "there, and restart.",
        ),
        (around(host("w1")), ""),
    ],
)
def test_a_job_that_no_worker_can_run_says_why_and_what_to_do(
    spec: JobSpec, deployment: Deployment, text: str
) -> None:
    assert obstacle(spec, deployment) == text


def test_a_job_of_a_newer_version_names_both_versions(spec: JobSpec) -> None:
    newer = replace(spec, version=3)
    assert obstacle(newer, around(host("w1", operations={"sum": 2}))) == (
        "It needs version 3 of operation 'sum', and the workers of queue unit.normal have version "
        "2: install the newer code there, and restart them."
    )


@pytest.mark.parametrize(
    ("deployment", "text"),
    [
        (
            around(host("w1", busy=2, active={"shop.slow": 2}), unit_normal=QueueReport(5)),
            "All 2 slots of queue unit.normal are busy (shop.slow on 2), and 5 messages wait.",
        ),
        (
            around(host("w1", slots=0), unit_normal=QueueReport(1)),
            "No slot of queue unit.normal is ready: the pool of worker w1 starts.",
        ),
        (
            around(host("w1", broker="amqp://there//"), unit_normal=QueueReport(1)),
            "1 message waits at redis://broker/1, and worker w1 consumes amqp://there//: if these "
            "are two brokers, set one RLM_BROKER_URL for all.",
        ),
        (
            around(host("w1", broker=BROKER), unit_normal=QueueReport(1)),
            "A worker takes it next: 2 slots of queue unit.normal are free.",
        ),
        (
            around(host("w1", broker=BROKER)),
            "Its message is on its way to a worker; if it is lost, it is sent again within about "
            "5 s.",
        ),
    ],
)
def test_a_queued_node_says_why_it_was_not_taken_yet(deployment: Deployment, text: str) -> None:
    assert waiting(QUEUE, deployment, 5.0) == text


def test_a_fresh_job_says_for_how_long_it_waits_and_for_what(
    platform: Platform, spec: JobSpec
) -> None:
    assert platform.explain(spec.job).startswith("It has waited ")
    assert " in queue unit.normal for a worker. Nobody works on it: no worker reports. " in (
        platform.explain(spec.job)
    )
    assert "Its message is on its way" in platform.explain(spec.job, host())


def test_the_nodes_of_a_lost_worker_do_not_run(platform: Platform, spec: JobSpec) -> None:
    assert platform.ledger.claim(spec.job, "root", "token", "w1").answer == "run"
    gone = [Departed(host("w1"), 74, stopped=False)]

    assert platform.explain(spec.job, host("w1")) == (
        "It runs on 1 slot, with 0 nodes queued and 0 parked."
    )
    assert platform.explain(spec.job, departed=gone) == (
        "It stands still, with 1 node left behind, 0 nodes queued and 0 parked. Nobody works on "
        "it: worker w1 was last heard 74 s ago, and no other worker consumes queue unit.normal. "
        "Type: celery -A shop worker"
    )
    assert platform.explain(spec.job, host("w2"), departed=gone) == (
        "It stands still, with 1 node left behind, 0 nodes queued and 0 parked. Worker w1 was last "
        "heard 74 s ago; others run its nodes when their leases have ended."
    )
    assert "Worker w1 is gone; others" in platform.explain(spec.job, host("w2"))
