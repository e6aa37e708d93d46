"""Messages for a newer worker go back to their queue."""

from __future__ import annotations

import pytest

from rlm_tasks.engine.message_handlers import beyond_this_worker
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.messaging.dispatch import is_id, legible, read_header
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
    read = read_header(header)
    assert beyond_this_worker(read).startswith(why)
    assert bool(beyond_this_worker(read)) == bool(why)


@pytest.mark.parametrize(
    "header",
    [
        None,
        [],
        "x",
        7,
        {"schema": "9", "operation": ["sum"], "version": None, "message": -1},
        {"schema": 10**400, "operation": {}, "version": 1.5, "message": "1"},
    ],
)
def test_a_header_with_wrong_fields_has_the_defaults(header: object) -> None:
    assert read_header(header) == (SCHEMA, "", 1, 0)


def test_names_and_ids_of_messages_are_short_and_printable_in_logs() -> None:
    assert legible("a\x1b]0;title\x07b\n") == "a?]0;title?b?"
    assert legible("x" * 100_000) == "x" * 100 + "..."
    assert [is_id(each) for each in ("a" * 200, "a" * 201, "", "a\x1b", 7, None)] == [
        True,
        *[False] * 5,
    ]
