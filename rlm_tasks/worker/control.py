"""Remote control commands: ``celery inspect`` and ``celery control`` for workers of the platform.

A handler runs in the event loop of the worker's main process, so it must not wait: its calls to
Redis fail after ``RLM_GUARD_TIMEOUT_S``.  The command line refuses wrong arguments before it sends
them.  `startup` imports this module, which registers the commands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from celery.worker.control import Panel, control_command, inspect_command

from resilience.degradation import as_level
from resilience.errors import InvalidValue, StoreUnavailable
from rlm_tasks.messaging.queue_names import queue_names
from rlm_tasks.worker.pools import wrong_pool

NOT_INSTALLED = {"error": "the platform is not installed in this app"}


def _ours(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Answer {"error": ...} if the platform is not installed, a value is wrong, or Redis away."""

    @functools.wraps(handler)
    def answering(state: Any, **arguments: Any) -> Any:
        if getattr(state.app, "rlm_runtime", None) is None:
            return NOT_INSTALLED
        try:
            return handler(state, **arguments)
        except (InvalidValue, StoreUnavailable) as error:
            return {"error": str(error)}

    return answering


# --- arguments, checked in the command line's process -----------------------------------------


def _level(value: str) -> str:
    try:
        return as_level(value).label
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise click.BadParameter(f"for_s={value!r}: give a number of seconds above 0")
    return seconds


# --- reading ----------------------------------------------------------------------------------


@inspect_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def pressure(state: Any, **_: Any) -> dict[str, Any]:
    """The pressure level that this worker applies, and the report of its host."""
    from msgspec import to_builtins

    own = state.app.rlm_supervisor.host.report()
    return {"acts_on": state.app.rlm_runtime().page.level.label, "host": to_builtins(own)}


@inspect_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def breakers(state: Any, **_: Any) -> dict[str, Any]:
    """The state of all circuit breakers."""
    from resilience.store import guard_store
    from rlm_tasks.engine.guards import breakers_of

    return breakers_of(guard_store(state.app.rlm_settings), state.app.rlm_settings).status()


@inspect_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def limits(state: Any, **_: Any) -> list[dict[str, Any]]:
    """The use of the rate limits and bulkheads that operations declare."""
    from dataclasses import asdict

    from rlm_tasks.telemetry.limit_reports import limit_reports

    return [asdict(each) for each in limit_reports(state.app.rlm_runtime().guards)]


@inspect_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def slots(state: Any, **_: Any) -> dict[str, Any]:
    """This worker's slots, and the nodes that run in them."""
    runtime, report = state.app.rlm_runtime(), state.app.rlm_supervisor.host.report()
    held = [{"pid": each.pid, "job": each.job, "node": each.node} for each in runtime.page.held()]
    free = max(0, report.slots - len(worker_state.reserved_requests))
    return {
        "total": report.slots,
        "free": 0 if runtime.page.draining else free,
        "draining": runtime.page.draining,
        "queues": list(report.queues),
        "nodes": held,
    }


# --- acting on all workers --------------------------------------------------------------------


@control_command(  # type: ignore[untyped-decorator]  # Celery ships no types
    args=[("level", _level), ("for_s", _seconds)],
    signature="<normal|elevated|high|critical|emergency> [seconds=600]",
)
@_ours
def force_pressure(state: Any, level: str = "", for_s: float = 600.0, **_: Any) -> dict[str, str]:
    """Make all workers apply a level for a drill, which ends by itself."""
    state.app.rlm_runtime().board.force(level, for_s)
    return {"ok": f"all workers act on {level}, for {for_s:g} s"}


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def release_pressure(state: Any, **_: Any) -> dict[str, str]:
    """End the drill."""
    state.app.rlm_runtime().board.release()
    return {"ok": "the drill has ended"}


@control_command(args=[("name", str)], signature="<service>")  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def reset_breaker(state: Any, name: str = "", **_: Any) -> dict[str, str]:
    """Close a circuit breaker, so that calls pass at once."""
    from resilience.store import guard_store
    from rlm_tasks.engine.guards import breakers_of

    settings = state.app.rlm_settings
    known = breakers_of(guard_store(settings), settings, state.app.rlm_runtime().delivery.wake)
    if name not in (names := known.names()):
        return {"error": f"there is no breaker {name!r}; there are: {', '.join(names) or 'none'}"}
    known.reset(name)
    return {"ok": f"{name} is closed"}


# --- acting on one worker ---------------------------------------------------------------------


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def rlm_drain(state: Any, **_: Any) -> dict[str, str]:
    """Take no more nodes, and hand over the running ones, until rlm_resume."""
    supervisor = state.app.rlm_supervisor
    queues = [
        queue
        for queue in supervisor.queues()
        if queue.startswith(f"{state.app.rlm_settings.namespace}.")
    ]
    for queue in queues:
        state.consumer.call_soon(state.consumer.cancel_task_queue, queue)
    supervisor.drain(queues)
    return {
        "ok": f"it drains; it no longer consumes {', '.join(queues) or 'any queue of the platform'}"
    }


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def rlm_resume(state: Any, **_: Any) -> dict[str, str]:
    """Take nodes again after rlm_drain."""
    if worker_state.should_stop is not None and worker_state.should_stop is not False:
        return {"error": "it is stopping"}
    queues = state.app.rlm_supervisor.resume()
    for queue in queues:
        state.consumer.call_soon(state.consumer.add_task_queue, queue)
    return {"ok": f"it consumes {', '.join(queues)} again" if queues else "it was not drained"}


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def rlm_recall(state: Any, **_: Any) -> dict[str, str]:
    """Make running nodes ask the ledger before their next item."""
    state.app.rlm_runtime().page.recall()
    return {"ok": "running nodes ask the ledger now"}


# --- commands of Celery -----------------------------------------------------------------------


def _also_cancel_jobs(command: str) -> None:
    """Make a command of Celery that revokes tasks cancel the jobs among its ids, too."""
    stock = Panel.data[command]

    @functools.wraps(stock)
    def handler(state: Any, *args: Any, **arguments: Any) -> Any:
        # Celery's part comes second: it needs long for many ids, and raises for one odd id.
        if (supervisor := getattr(state.app, "rlm_supervisor", None)) is not None:
            supervisor.revocations.add(maybe_list(arguments.get("task_id")) or ())
            supervisor.wake()
        return stock(state, *args, **arguments)

    Panel.data[command] = handler


def _refuse_queues_of_jobs() -> None:
    """Make `add_consumer` refuse a queue of jobs, if the worker's pool cannot run them."""
    stock = Panel.data["add_consumer"]

    @functools.wraps(stock)
    def handler(state: Any, queue: str = "", *args: Any, **arguments: Any) -> Any:
        settings = getattr(state.app, "rlm_settings", None)
        of_jobs = settings is not None and queue in queue_names(settings)
        if of_jobs and (wrong := wrong_pool(state.consumer.controller)):
            return {"error": f"{wrong}: this pool cannot run jobs, so it takes no {queue}"}
        return stock(state, queue, *args, **arguments)

    Panel.data["add_consumer"] = handler


_refuse_queues_of_jobs()
_also_cancel_jobs("revoke")
_also_cancel_jobs("terminate")


# --- commands of the platform to its own workers ----------------------------------------------


@control_command()  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def rlm_monitor(state: Any, **_: Any) -> dict[str, str]:
    """Measure the cluster's level, unless another worker does; beat sends this to all workers."""
    state.app.rlm_monitor.ask()
    return {"ok": "a measurement is requested"}


@control_command(args=[("queue", str)], signature="<queue>")  # type: ignore[untyped-decorator]  # Celery ships no types
@_ours
def rlm_yield(state: Any, queue: str = "", **_: Any) -> dict[str, str]:
    """Make running nodes yield to urgent work in a queue, if this worker serves it."""
    if not state.app.rlm_supervisor.make_room(queue):
        return {"ok": f"this worker does not serve {queue!r}"}
    return {"ok": "running nodes ask whether to yield"}
