"""Messages for a newer worker go back to their queue."""

from __future__ import annotations

import pytest

from rlm_tasks.engine.message_handlers import beyond_this_worker
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.operations import registry

registry.import_operations(())


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({}, ""),
        ({"schema": SCHEMA, "operation": "sum", "version": 1}, ""),
        ({"schema": SCHEMA - 1, "operation": "sum", "version": 0}, ""),
        ({"schema": SCHEMA + 1, "operation": "sum", "version": 1}, f"jobs of schema {SCHEMA + 1}"),
        (
            {"schema": SCHEMA, "operation": "sum", "version": 2},
            "version 2 of operation 'sum'; this worker has 1",
        ),
    ],
)
def test_a_worker_refuses_work_beyond_it_by_the_message_header(
    header: dict[str, object], why: str
) -> None:
    assert beyond_this_worker(header).startswith(why)
    assert bool(beyond_this_worker(header)) == bool(why)
