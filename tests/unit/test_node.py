"""What a node does with each answer of CLAIM, and with work that this worker cannot do."""

from __future__ import annotations

import msgspec
import pytest

from rlm_tasks import JobRequest, NWay
from rlm_tasks.ledger import ROOT
from rlm_tasks.node import run_node
from rlm_tasks.spec import SCHEMA, Spec
from tests.unit.harness import Platform


def opened(platform: Platform, **changed: object) -> Spec:
    """Open a job whose spec is changed in a way that a client of this version would not."""
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    changed_spec = msgspec.structs.replace(spec, job="other", **changed)
    platform.ledger.open([changed_spec], 3600)
    return changed_spec


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"operation": "summ"}, "did you mean 'sum'"),
        ({"version": 2}, "version 2, this worker has 1"),
        ({"schema": SCHEMA + 1}, "schema"),
    ],
    ids=["unknown operation", "newer version", "newer schema"],
)
def test_work_for_another_worker_is_parked_with_the_reason(changed: dict[str, object], why: str) -> None:
    platform = Platform()
    spec = opened(platform, **changed)

    fills = run_node(platform.runtime, spec.job, ROOT)

    [record] = platform.ledger.records(spec.job, [ROOT])
    assert (fills, record.state) == (False, "p")
    assert why in record.why
    assert run_node(platform.runtime, spec.job, ROOT) is False, "parked: its slot is left alone"


def test_messages_that_find_nothing_to_run_leave_or_fill_their_slot() -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(100), strategy=NWay(split_factor=4, min_chunk_size=25)))

    assert run_node(platform.runtime, spec.job, "unknown") is False
    assert run_node(platform.runtime, spec.job, ROOT) is False, "cut: its children fill the slot"
    sent = platform.mailbox.sent
    assert run_node(platform.runtime, spec.job, ROOT) is False
    assert platform.mailbox.sent == sent + 4, "all four still wait, so they are sent again"
    job, first = platform.mailbox.messages[1]
    assert run_node(platform.runtime, job, first) is True
    assert run_node(platform.runtime, job, first) is True, "done: the part may have been lost"
    held = platform.mailbox.messages[2][1]
    platform.ledger.claim(spec.job, held, "somebody", "else")
    assert run_node(platform.runtime, spec.job, held) is False, "busy: the holder fills the slot"
    platform.ledger.stop(spec.job, "cancelled", force=True)
    assert run_node(platform.runtime, spec.job, held) is True, "closed: the chord drains"
