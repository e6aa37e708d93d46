"""Why no worker runs the nodes of a job, in one sentence with the command that helps.

`ledger.explain` calls `obstacle` for jobs, the doctor calls the same rules for queues and
operations.  The functions are pure: they compare a job with the reports of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.operations import registry
from rlm_tasks.words import age, count, duration, listed
from scheduler.board import Departed, HostReport, Workers, version_on
from scheduler.queues import QueueReport

CONNECTS_S = 5.0
"""A worker that starts reaches its broker within this time; Celery's mingle alone takes 1 s."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """The facts around all jobs: workers, queues, and the app that asks."""

    workers: Workers
    queues: Mapping[str, QueueReport] | None  # name -> depth and age; None: no answer of the broker
    broker: str  # URL of this app's broker, without its password
    command: str  # the beginning of Celery's commands for this app: "celery -A shop"


def obstacle(spec: JobSpec, deployment: Deployment) -> str:
    """Return why no worker can run the nodes of a job; '' if a worker can.

    The text is one or two whole sentences.
    """
    workers, command = deployment.workers, deployment.command
    if deployment.queues is None and workers.live:
        return "The broker does not answer, so no message reaches a worker."
    serving = workers.of_queue(spec.queue)
    if all(host.draining for host in serving):
        drained = [host for host in workers.live if spec.queue in host.drained]
        if ending := [*serving, *drained]:
            return f"Nobody works on it: {drains(ending)} {resume(ending, command)}"
        return f"Nobody works on it: {_nobody(spec.queue, workers, command)}"
    return unfit(spec.operation, spec.version, spec.schema, serving, spec.queue)


def unfit(
    operation: str, version: int, schema: int, serving: Sequence[HostReport], queue: str
) -> str:
    """Return why none of some workers can run an operation; '' if one can, or if unknown."""
    known = version_on(serving, operation)
    if known == 0:
        return (
            f"No worker of queue {queue} knows operation {operation!r}: set RLM_OPERATIONS of "
            f"{_names(serving)} to {_module(operation)}, and restart."
        )
    if known is not None and known < version:
        return (
            f"It needs version {version} of operation {operation!r}, and the workers of queue "
            f"{queue} have version {known}: install the newer code there, and restart them."
        )
    if serving and all(0 < host.schema < schema for host in serving):
        return (
            f"Its form (schema {schema}) is newer than {_names(serving)} can read: install this "
            "release there, and restart."
        )
    return ""


def _module(operation: str) -> str:
    """Return the module of an operation that this process knows, else words for it."""
    if operation not in registry.names():
        return "its module"
    module = getattr(registry.get(operation).function, "__module__", "")
    if module == "__main__":
        return "its module (not __main__, which workers cannot import)"
    return module or "its module"


def _nobody(queue: str, workers: Workers, command: str) -> str:
    last = workers.last_of_queue(queue)
    if last is not None:
        others = f"no other worker consumes queue {queue}"
        return f"{gone(last)}, and {others}. Type: {_start(queue, workers, command)}"
    if said := connects(workers.live) or deaf(workers.live):
        return f"{said}."
    if workers.live:
        return (
            f"no worker consumes queue {queue}; {_consumed(workers.live)}. "
            f"Type: {_start(queue, workers, command)}"
        )
    return (
        f"no worker reports. Type: {command} worker; if one runs, it needs the same RLM_REDIS_URL "
        "and RLM_NAMESPACE."
    )


def connects(hosts: Sequence[HostReport]) -> str:
    """Return which workers connect to their broker just now; '' if none does."""
    found = [host for host in _without_queue(hosts) if host.deaf_s < CONNECTS_S]
    if not found:
        return ""
    return (
        f"{_names(found)} {_verb(found, 'connects', 'connect')} to the broker "
        f"({found[0].broker or 'unknown'}), and {_verb(found, 'consumes', 'consume')} no queue yet"
    )


def deaf(hosts: Sequence[HostReport]) -> str:
    """Return which workers have consumed no queue for long, and since when; '' if none."""
    found = [host for host in _without_queue(hosts) if host.deaf_s >= CONNECTS_S]
    if not found:
        return ""
    return (
        f"{_names(found)} {_verb(found, 'has', 'have')} consumed no queue for "
        f"{duration(min(host.deaf_s for host in found))}: the connection to the broker "
        f"({found[0].broker or 'unknown'}) may be lost"
    )


def _without_queue(hosts: Sequence[HostReport]) -> list[HostReport]:
    return [host for host in hosts if not host.queues and not host.draining]


def drains(hosts: Sequence[HostReport]) -> str:
    """Return a sentence on workers that drain."""
    return f"{_names(hosts)} {_verb(hosts, 'drains, and takes', 'drain, and take')} no more work."


def resume(hosts: Sequence[HostReport], command: str) -> str:
    """Return the command by which workers that drain take work again."""
    return f"If nobody stops {_verb(hosts, 'it', 'them')}, type: {command} control rlm_resume"


def _start(queue: str, workers: Workers, command: str) -> str:
    """Return the command that starts a worker for a queue; a worker without -Q consumes all."""
    return f"{command} worker{f' -Q {queue}' if workers.live else ''}"


def gone(departed: Departed) -> str:
    """Return when a worker was heard last, or stopped: "worker w was last heard 74 s ago"."""
    what = "was stopped" if departed.stopped else "was last heard"
    return f"worker {departed.report.worker} {what} {age(departed.ago_s)}"


def _consumed(hosts: Sequence[HostReport]) -> str:
    queues = dict.fromkeys(name for host in hosts for name in host.queues)
    return f"{_names(hosts)} {_verb(hosts, 'consumes', 'consume')} {listed(tuple(queues))}"


def _names(hosts: Sequence[HostReport]) -> str:
    return listed(tuple(host.worker for host in hosts), noun="worker")


def _verb(hosts: Sequence[HostReport], of_one: str, of_many: str) -> str:
    return of_one if len(hosts) == 1 else of_many


def _waits(depth: int) -> str:
    return f"{count(depth, 'message')} {'waits' if depth == 1 else 'wait'}"


def waiting(queue: str, deployment: Deployment, sweep_s: float) -> str:
    """Return why the message of a queued node was not taken yet, although a worker can run it."""
    serving = deployment.workers.of_queue(queue)
    slots, busy = sum(host.slots for host in serving), sum(host.busy for host in serving)
    depth = (deployment.queues or {}).get(queue, QueueReport(0)).depth
    if not slots:
        return f"No slot of queue {queue} is ready: the pool of {_names(serving)} starts."
    if busy >= slots:
        work = sum((Counter(host.active) for host in serving), Counter[str]())
        what = listed(tuple(f"{name} on {number}" for name, number in work.most_common()))
        on = f" ({what})" if what else ""
        return f"All {count(slots, 'slot')} of queue {queue} are busy{on}, and {_waits(depth)}."
    elsewhere = [host for host in serving if host.broker not in ("", deployment.broker)]
    if depth and len(elsewhere) == len(serving):
        return (
            f"{_waits(depth)} at {deployment.broker}, and {_names(elsewhere)} "
            f"{_verb(elsewhere, 'consumes', 'consume')} {elsewhere[0].broker}: if these are two "
            "brokers, set one RLM_BROKER_URL for all."
        )
    if not depth:
        return (
            "Its message is on its way to a worker; if it is lost, it is sent again within about "
            f"{duration(sweep_s)}."
        )
    free = slots - busy
    return f"A worker takes it next: {count(free, 'slot')} of queue {queue} {_are(free)} free."


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
