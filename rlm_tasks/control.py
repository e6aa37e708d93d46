"""Remote control commands: what ``celery control`` can ask of the platform's workers.

Decides names and answers; a handler runs in the worker's main process and must not block.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
def rlm_monitor(state: Any, **_: Any) -> dict[str, str]:
    """Work out the cluster's level, unless another worker does: beat asks this of all workers."""
    monitor = getattr(state.app, "rlm_monitor", None)
    if monitor is None:
        return {"error": "the platform is not installed in this app"}
    monitor.ask()
    return {"ok": "asked"}


@control_command(args=[("queue", str)], signature="<queue>")  # type: ignore[untyped-decorator]  # Celery ships no types
def rlm_yield(state: Any, queue: str, **_: Any) -> dict[str, str]:
    """Let running nodes make room for urgent work that waits in a queue, if this worker serves it."""
    guard = getattr(state.app, "rlm_guard", None)
    if guard is None:
        return {"error": "the platform is not installed in this app"}
    return {"ok": "told" if guard.make_room(queue) else f"this worker does not serve {queue}"}


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
def rlm_recall(state: Any, **_: Any) -> dict[str, str]:
    """Make running nodes look at the ledger before their next item."""
    runtime = getattr(state.app, "rlm_runtime", None)
    if runtime is None:
        return {"error": "the platform is not installed in this app"}
    runtime().page.recall()
    return {"ok": "recalled"}
