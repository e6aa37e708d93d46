"""Where a process may die, by name: the places that the fault tests kill it at.

Decides the names; refuses to know what happens there.  A runtime calls `reached` at each of them,
once a node or a slice, and nothing is listening unless a test has put its own hook in place."""

from __future__ import annotations

from enum import StrEnum


class CrashPoint(StrEnum):
    """A place between two steps whose order matters."""

    BEFORE_CLAIM = "before claim"  # the message is here, the node is nobody's
    AFTER_CLAIM = "after claim"  # the node is ours, nothing is done
    MID_SLICE = "mid slice"  # items are done, the ledger does not know
    BEFORE_FINISH = "before finish"  # all is done, the ledger does not know
    BEFORE_PUBLISH = (
        "between finish and publish"  # children are registered, their messages are not sent
    )
    DURING_MERGE = "during merge"  # the root merge is ours, the answer is not made
    BEFORE_CLOSE = "between merge and close"  # the answer is made, the ledger does not know


def nobody_listens(_: CrashPoint) -> None:
    """Go on."""
