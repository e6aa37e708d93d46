"""Say in one sentence why a job waits, what it does, or how it ended.  Pure: facts in, words
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rlm_tasks.jobs.endings import CAUSES, sentence
from rlm_tasks.ledger.records import MERGE, NodeRecord
from rlm_tasks.results import Status


def explain(facts: Mapping[str, str], nodes: Sequence[NodeRecord], now_ms: int) -> str:
    """Return the sentence."""
    state = facts["state"]
    if Status(state).final:
        return sentence(facts)
    if state == "merging":
        waits = next(
            (node.why for node in nodes if node.id == MERGE and node.state == "p"),
            "the answer is being merged",
        )
        return f"Every item is accounted for; {waits}."
    states = Counter(node.state for node in nodes)
    if facts.get("stop"):
        return f"It is stopping because {CAUSES.get(facts['stop'], facts['stop'])}; {states['r']} nodes are still in a slice."
    if state == "pending":
        waited = (now_ms - int(facts["opened_ms"])) / 1000
        if parked := next((node.why for node in nodes if node.state == "p"), ""):
            return f"It has waited {waited:.1f} s to be started: {parked}."
        return f"It has waited {waited:.1f} s in queue {facts['queue']} for a worker; is one consuming that queue?"
    reasons = Counter(node.why for node in nodes if node.state == "p")
    because = "; ".join(why for why, _ in reasons.most_common(3))
    if not states["r"] and states["p"]:
        return f"It waits: {states['p']} nodes are parked ({because})."
    if not states["r"]:
        return f"It waits for a free worker: {states['q']} nodes are in queue {facts['queue']}."
    slots = f"{states['r']} slot{'s' if states['r'] > 1 else ''}"
    return f"It runs on {slots}, with {states['q']} nodes queued and {states['p']} parked{f' ({because})' if because else ''}."
