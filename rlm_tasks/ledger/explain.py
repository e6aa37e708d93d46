"""Sentences about a job: why it waits, what it does, or how it ended.

`JobReader.explain` and the bundle of a bug report call `explain`.  The function is pure: it takes
facts of the ledger and reports of workers, and returns words.  `obstacles` has the rules for jobs
that no worker can run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from rlm_tasks.jobs.endings import CAUSES, sentence, stopped_at
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.obstacles import Deployment, gone, obstacle, waiting
from rlm_tasks.ledger.records import NodesAtWork
from rlm_tasks.results import Status, hidden
from rlm_tasks.words import count, duration, listed

MOST_REASONS = 3
"""An explanation names this many reasons why nodes are parked."""


def explain(
    facts: Mapping[str, str],
    at_work: NodesAtWork,
    now_ms: int,
    spec: JobSpec | None,
    deployment: Deployment,
    *,
    sweep_s: float,
) -> str:
    """Return the sentences about a job.

    They come from its facts, its nodes, the server's time, its specification (None: it cannot be
    read) and the platform around it.  `sweep_s` is the interval of sweeps in seconds.
    """
    if Status(facts["state"]).final:
        return sentence(facts, now_ms)
    blocked = obstacle(spec, deployment) if spec is not None else ""
    lost = _lost(at_work, deployment)
    running = max(0, at_work.running - sum(lost.values()))
    if facts["state"] == "merging":
        what = _merging(at_work, running)
    elif facts.get("stop"):
        cause = CAUSES.get(facts["stop"], facts["stop"])
        cause += stopped_at(facts, now_ms) if facts["stop"] == "cancelled" else ""
        what = f"It is stopping because {cause}; {_are(running)} still in a slice."
    elif running:
        what = _running(at_work, running)
    else:
        what = _idle(facts, _told_once(at_work) if blocked else at_work, now_ms, lost)
        if not (blocked or lost or at_work.parked) and at_work.queued:
            blocked = waiting(facts["queue"], deployment, sweep_s)
    told = blocked if blocked and not running else _left_behind(lost, deployment)
    return f"{what} {told or _breaker_hint(at_work, deployment)}".rstrip()


def _told_once(at_work: NodesAtWork) -> NodesAtWork:
    """Return nodes without the reasons that a worker gave which cannot run them.

    The sentence on what blocks the job tells the same of all workers, and what to do.
    """
    kept = {why: held for why, held in at_work.reasons.items() if not why.startswith("worker ")}
    return replace(at_work, reasons=kept)


def _breaker_hint(at_work: NodesAtWork, deployment: Deployment) -> str:
    """Return the command that shows the failures of a service, if its breaker holds nodes."""
    held = any(each.startswith("breaker ") for each in at_work.reasons)
    return f"Type: {deployment.command} rlm breakers" if held else ""


def _merging(at_work: NodesAtWork, running: int) -> str:
    done = "All of its items are done, failed or skipped; "
    if at_work.reasons:
        return f"{done}{next(iter(at_work.reasons))}."
    if running:
        return f"{done}the answer is being merged."
    return f"{done}the answer waits to be merged."


def _running(at_work: NodesAtWork, running: int) -> str:
    others = f"{count(at_work.queued, 'node')} queued and {at_work.parked} parked"
    because = _because(at_work)
    return (
        f"It runs on {count(running, 'slot')}, with {others}{f' ({because})' if because else ''}."
    )


def _idle(
    facts: Mapping[str, str], at_work: NodesAtWork, now_ms: int, lost: Mapping[str, int]
) -> str:
    """Return for how long a job waits, and for what its parked nodes wait."""
    if facts["state"] == "pending":
        waited = f"It has waited {duration((now_ms - int(facts['opened_ms'])) / 1000)}"
        if at_work.reasons:
            return f"{waited} to be started: {next(iter(at_work.reasons))}."
        return f"{waited} in queue {facts['queue']} for a worker."
    if lost:
        others = f"{count(at_work.queued, 'node')} queued and {at_work.parked} parked"
        return f"It stands still, with {count(sum(lost.values()), 'node')} left behind, {others}."
    if at_work.parked:
        because = f" ({_because(at_work)})" if at_work.reasons else ""
        return f"It waits: {_are(at_work.parked)} parked{because}."
    idle = f"No node of it has begun for {duration((now_ms - last_begun_ms(facts)) / 1000)}"
    return f"{idle}; {_are(at_work.queued)} in queue {facts['queue']}."


def last_begun_ms(facts: Mapping[str, str]) -> int:
    """Return when a node of a job has begun last, else when the job was opened, in ms."""
    return max(int(facts.get(name) or 0) for name in ("claimed_ms", "opened_ms"))


def _because(at_work: NodesAtWork) -> str:
    return "; ".join(why for why, _ in Counter(at_work.reasons).most_common(MOST_REASONS))


def _lost(at_work: NodesAtWork, deployment: Deployment) -> dict[str, int]:
    """Return the workers that no longer report, and the nodes that they held."""
    live = {host.worker for host in deployment.workers.live}
    return {worker: held for worker, held in at_work.holders.items() if worker not in live}


def _left_behind(lost: Mapping[str, int], deployment: Deployment) -> str:
    """Return which workers left nodes of the job behind, and what becomes of these nodes."""
    if not lost:
        return ""
    known = {each.report.worker: each for each in deployment.workers.departed}
    workers = [gone(known[name]) if name in known else f"worker {name} is gone" for name in lost]
    told = listed(workers)
    return f"{told[:1].upper()}{told[1:]}; others run its nodes when their leases have ended."


def without_message(facts: Mapping[str, str]) -> dict[str, str]:
    """Return the facts of a job without the message of its error, which may contain items."""
    if not facts.get("error"):
        return dict(facts)
    error = msgspec.json.decode(facts["error"])
    kept = {"type": error["type"], "message": hidden(error["message"])}
    return {**facts, "error": msgspec.json.encode(kept).decode()}


def _are(number: int) -> str:
    return f"{count(number, 'node')} {'is' if number == 1 else 'are'}"
