"""Commands for jobs: list, show, tree, explain, cancel, retry."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.job_ids import (
    command,
    goes_on,
    job_argument,
    job_of,
    short,
)
from rlm_tasks.cli.output import (
    answer,
    as_json_option,
    client_of,
    colored,
    print_json,
    say,
    session_of,
    shows_messages,
    table,
    wide_option,
)
from rlm_tasks.cli.tables import has_room
from rlm_tasks.cli.watching import ended_items, explained, sentence_about, share_of, show_live

if TYPE_CHECKING:
    from rlm_tasks.client.job import Job
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.results import ItemFailure, JobEvent, Progress

SHOWN = 20
"""Events of a job that are shown to people: the last ones."""
NAMED = 8
"""Indexes of items that are shown for each kind of failure."""
_AGE_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)")
_AGE = re.compile(rf"(?:{_AGE_PART.pattern}\s*)+")
_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_COLUMNS = ("job", "operation", "status", "progress", "failed", "age")
_MORE = ("items", "skipped", "nodes", "time", "priority", "submitted (UTC)", "description")
_ROOMY = 120
"""From this width on a list has more columns than the first ones."""


# --- the list ---------------------------------------------------------------------------------


def _statuses(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from rlm_tasks.results import Status

    return [str(each) for each in Status if each.startswith(incomplete)]


@click.command()
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1), help="Number of jobs."
)
@click.option("--operation", help="Only jobs of this operation.")
@click.option(
    "--status",
    multiple=True,
    shell_complete=_statuses,
    help="Only jobs with this status; may be repeated.",
)
@click.option("--since", help="Only jobs of the last 90s, 30min, 1h or 2d, or since a date.")
@click.option("--open", "only_open", is_flag=True, help="Only jobs that have not ended.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids, one on each line.")
@wide_option
@as_json_option
@click.pass_context
def jobs(
    ctx: click.Context,
    /,
    limit: int,
    quiet: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """List jobs, the newest first."""
    from rlm_tasks.client.job_search import listed

    ledger = session_of(ctx).ledger
    found = _found(ctx, limit + 1, **filters)
    shown = found[:limit]
    if as_json:
        print_json([_outline(spec, at) for spec, at in listed(ledger, shown)])
    elif quiet:
        click.echo("".join(f"{job}\n" for job in shown), nl=False)
    else:
        rows = listed(ledger, shown)
        now = ledger.clock()
        columns = (*_COLUMNS, *(_MORE if has_room(_ROOMY) else ()))
        cells = (_row(*row, now)[: len(columns)] for row in rows)
        table("Jobs", columns, cells, minor=(*reversed(_MORE), "progress", "failed"))
        if len(found) > limit:
            say(f"These are the newest {limit:,}; --limit {limit * 5} shows more.")


def _found(
    ctx: click.Context,
    limit: int,
    *,
    operation: str | None,
    status: tuple[str, ...],
    since: str | None,
    only_open: bool,
) -> list[str]:
    """Return the ids of the newest jobs that match the options.  Raises InvalidRequest."""
    from rlm_tasks.client.job_search import newest
    from rlm_tasks.errors import InvalidRequest
    from rlm_tasks.results import Status

    if only_open and status:
        raise InvalidRequest("--status", status[0], "leave it out, or leave out --open")
    statuses = [each for each in Status if not each.final] if only_open else status or None
    return newest(session_of(ctx).ledger, limit, operation, statuses, _since(since))


def _since(text: str | None) -> timedelta | datetime | None:
    """Return an age such as "1h" or "1h30min", or a date and time.  Raises InvalidRequest."""
    from rlm_tasks.errors import InvalidRequest

    if text is None:
        return None
    try:
        if _AGE.fullmatch(text):
            parts = _AGE_PART.findall(text)
            return timedelta(seconds=sum(float(number) * _UNITS_S[unit] for number, unit in parts))
        return datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        advice = "give an age, such as 90s, 30min, 1h or 2d, or a date, such as 2026-11-30"
        raise InvalidRequest("--since", text, advice) from None


def _outline(spec: JobSpec, at: Progress) -> dict[str, Any]:
    about = {"id": spec.job, "operation": spec.operation, "priority": spec.priority}
    return {**about, "description": spec.description, **_progress(at)}


def _row(spec: JobSpec, at: Progress, now: float) -> tuple[Any, ...]:
    from rlm_tasks.jobs.endings import shown_progress
    from rlm_tasks.words import duration

    return (
        short(spec.job),
        spec.operation,
        shown_progress(at),
        f"{share_of(at):.0%}",
        at.failed,
        duration(max(1.0, now - at.submitted_at)),
        at.total,
        at.skipped,
        at.nodes,
        duration(at.elapsed_s),
        spec.priority,
        f"{datetime.fromtimestamp(at.submitted_at, UTC):%Y-%m-%d %H:%M:%S}",
        spec.description,
    )


def _progress(progress: Progress) -> dict[str, Any]:
    return {**asdict(progress), "fraction": progress.fraction}


# --- one job ----------------------------------------------------------------------------------


@click.command()
@job_argument
@click.option("--watch", is_flag=True, help="Show a progress bar until the job ends.")
@as_json_option
@click.pass_context
def job(ctx: click.Context, job_id: str, watch: bool, as_json: bool) -> None:
    """Show one job: its progress, why it waits or how it ended, its failures and its events."""
    handle = job_of(ctx, job_id)
    if watch:
        with goes_on(ctx, handle):
            if sys.stderr.isatty():
                show_live(ctx, handle, err=True)
            else:
                handle.wait()
    if as_json:
        print_json(_document(handle, shows=shows_messages(ctx)))
    else:
        _show(ctx, handle)


def _document(handle: Job, *, shows: bool) -> dict[str, Any]:
    progress, spent = handle.progress(), handle.spent()
    names = ("index", "type", "code", "where", *(("message",) if shows else ()))
    about = {
        "explain": handle.explain(message=shows),
        "trace_id": handle.trace_id,
        "failures": [{name: getattr(each, name) for name in names} for each in handle.failures()],
        "events": [asdict(each) for each in handle.events()],
        "rounds": [each.id for each in handle.rounds()],
        "spent": asdict(spent) if spent else None,
    }
    return {"id": handle.id, **_progress(progress), **about}


def _show(ctx: click.Context, handle: Job) -> None:
    from rlm_tasks.client.job_search import listed

    session = session_of(ctx)
    spent, failures = handle.spent(), handle.failures()  # they raise JobNotFound, JobUnreadable
    for spec, at in listed(session.ledger, [handle.id]):
        say(_heading(spec, at, session.ledger.clock()))
    say(explained(ctx, handle))
    if session.settings.tracing.enabled:
        say(f"Trace: {handle.trace_id}")
    if failures:
        _show_kinds(failures)
        say(f"Failed items: {command(ctx, 'failures', handle.id)}")
    if spent:
        from rlm_tasks.results import COLUMNS, rows

        table("Calls to models", COLUMNS, rows(spent))
        say(str(spent))
    _show_events(ctx, handle.id, handle.events())


def _heading(spec: JobSpec, at: Progress, now: float) -> str:
    from rlm_tasks.jobs.endings import shown_progress
    from rlm_tasks.words import age, count, duration

    about = f": {spec.description}" if spec.description else ""
    ended = f"{ended_items(at):,} of {count(at.total, 'item')}, {at.failed:,} failed"
    counts = "" if at.status.final else f" {share_of(at):.0%}: {ended},"
    took = f" in {duration(at.elapsed_s)}" if at.elapsed_s else ""
    return (
        f"{spec.job}\n"
        f"{spec.operation}{about}\n"
        f"{colored(*shown_progress(at))},{counts} {count(at.nodes, 'node')}{took}\n"
        f"submitted {age(now - at.submitted_at)}, priority {spec.priority}"
    )


def _show_kinds(failures: list[ItemFailure]) -> None:
    """Print failures, one row for each type and code."""
    from rlm_tasks.jobs.item_failures import alike

    rows = (
        (type, code, len(indexes), _first_of(indexes)) for type, code, indexes in alike(failures)
    )
    table("Failures", ("type", "code", "items", "index"), rows)


def _first_of(indexes: list[int]) -> str:
    return ", ".join(map(str, indexes[:NAMED])) + (", ..." if len(indexes) > NAMED else "")


def _show_events(ctx: click.Context, job: str, events: list[JobEvent]) -> None:
    began = events[0].at if events else 0.0
    table(
        "Events",
        ("after s", "event", "about"),
        ((f"{e.at - began:.3f}", e.event, e.detail) for e in events[-SHOWN:]),
    )
    if len(events) > SHOWN:
        say(f"{len(events) - SHOWN:,} earlier events: {command(ctx, 'events', job)}")


@click.command()
@job_argument
@wide_option
@as_json_option
@click.pass_context
def tree(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Show the tree of a job's nodes."""
    handle = job_of(ctx, job_id)
    nodes = handle.tree(message=shows_messages(ctx))
    if as_json:
        print_json([asdict(node) for node in nodes])
        return
    columns = ("node", "range", "worked", "state", "ms", "worker", "why")
    minor = ("worker", "worked", "ms", "why")
    rows = (
        (
            "  " * n.depth + n.id,
            f"[{n.lo}, {n.hi})",
            n.worked,
            n.state,
            int(n.duration_ms),
            n.worker,
            n.why,
        )
        for n in nodes
    )
    table(f"Nodes of {handle.id}", columns, rows, minor=minor)
    if nodes.note:
        say(nodes.note)


@click.command()
@job_argument
@as_json_option
@click.pass_context
def explain(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Print one sentence: why a job waits, what it does, or how it ended."""
    handle = job_of(ctx, job_id)
    sentence = explained(ctx, handle)
    answer({"id": handle.id, "explain": sentence}, sentence, as_json)


# --- actions ----------------------------------------------------------------------------------


@click.command()
@job_argument
@as_json_option
@click.pass_context
def cancel(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Cancel a job with its whole tree."""
    from rlm_tasks.results import Status

    handle = job_of(ctx, job_id)
    had_ended = handle.status.final
    now = handle.cancel()
    had_ended |= now.final and now is not Status.CANCELLED
    happened = (
        f"Job {short(handle.id)} had ended before; nothing was cancelled. {explained(ctx, handle)}"
        if had_ended
        else sentence_about(ctx, handle)
    )
    answer({"id": handle.id, "status": handle.status}, happened, as_json)


@click.command()
@job_argument
@click.option("--reread", is_flag=True, help="Read failed lines anew: their file was mended.")
@as_json_option
@click.pass_context
def retry(ctx: click.Context, job_id: str, reread: bool, as_json: bool) -> None:
    """Open a new job on the failed items of a job that has ended, and print its id."""
    first = client_of(ctx).job(job_id)
    again = first.retry_failed(reread=reread)
    answer({"id": again.id}, again.id, as_json)
    say(
        f"Job {short(again.id)} runs the failed items of job {short(first.id)} again. "
        f"Watch it: {command(ctx, 'watch', again.id)}",
        err=True,
    )


COMMANDS = (jobs, job, tree, explain, cancel, retry)
