"""One sentence about a job: why it waits, what it does, or how it ended.

`JobReader.explain` and the bundle of a bug report call `explain`.  The function is pure: it takes
facts of the ledger and returns words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from rlm_tasks.jobs.endings import CAUSES, sentence
from rlm_tasks.ledger.records import NodesAtWork
from rlm_tasks.results import Status


def explain(facts: Mapping[str, str], at_work: NodesAtWork, now_ms: int) -> str:
    """Return the sentence about a job, from its facts, its nodes and the server's time."""
    state = facts["state"]
    if Status(state).final:
        return sentence(facts)
    running, queued, parked = at_work.running, at_work.queued, at_work.parked
    first = next(iter(at_work.reasons), "")
    if state == "merging":
        return (
            "All of its items are done, failed or skipped; "
            f"{first or 'the answer is being merged'}."
        )
    if facts.get("stop"):
        cause = CAUSES.get(facts["stop"], facts["stop"])
        return f"It is stopping because {cause}; {_nodes(running)} still in a slice."
    if state == "pending":
        waited = f"It has waited {(now_ms - int(facts['opened_ms'])) / 1000:.1f} s"
        if first:
            return f"{waited} to be started: {first}."
        return f"{waited} in queue {facts['queue']} for a worker; does a worker consume that queue?"
    because = "; ".join(why for why, _ in Counter(at_work.reasons).most_common(3))
    if not running and parked:
        return f"It waits: {_nodes(parked)} parked ({because})."
    if not running:
        return f"It waits for a free worker: {_nodes(queued)} in queue {facts['queue']}."
    slots = f"{running} slot{'s' if running > 1 else ''}"
    others = f"{queued} node{'s' if queued != 1 else ''} queued and {parked} parked"
    return f"It runs on {slots}, with {others}{f' ({because})' if because else ''}."


def without_message(facts: Mapping[str, str]) -> dict[str, str]:
    """Return the facts of a job without the message of its error, which may contain items."""
    if not facts.get("error"):
        return dict(facts)
    error = msgspec.json.decode(facts["error"])
    kept = {"type": error["type"], "message": f"({len(error['message'])} characters)"}
    return {**facts, "error": msgspec.json.encode(kept).decode()}


def _nodes(count: int) -> str:
    return "1 node is" if count == 1 else f"{count} nodes are"
