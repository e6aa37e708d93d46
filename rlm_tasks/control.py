"""Remote control commands: what ``celery control`` can ask of the platform's workers.

Decides names and answers; a handler runs in the worker's main process and must not block.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
def rlm_recall(state: Any, **_: Any) -> dict[str, str]:
    """Make running nodes look at the ledger before their next item."""
    runtime = getattr(state.app, "rlm_runtime", None)
    if runtime is None:
        return {"error": "the platform is not installed in this app"}
    runtime().page.recall()
    return {"ok": "recalled"}
