"""The places where fault tests end a process, by name.

A runtime calls its hook `reached` at each of them, once for each node or slice.  The hook does
nothing unless a test sets its own.
"""

from __future__ import annotations

from enum import StrEnum


class CrashPoint(StrEnum):
    """A place between two steps whose order matters."""

    BEFORE_CLAIM = "before claim"  # the message has arrived, no process holds the node
    AFTER_CLAIM = "after claim"  # this process holds the node, no item has run
    MID_SLICE = "mid slice"  # items have ended, the ledger does not know
    BEFORE_FINISH = "before finish"  # all items have ended, the ledger does not know
    # The children are registered, their messages are not sent.
    BEFORE_PUBLISH = "between finish and publish"
    DURING_MERGE = "during merge"  # this process holds the root merge, the answer is not made
    BEFORE_CLOSE = "between merge and close"  # the answer is made, the ledger does not know


def no_hook(_: CrashPoint) -> None:
    """Do nothing."""
