"""Commands for jobs: submit, plan, list, show, explain, cancel, retry."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.output import answer, as_json_option, client_of, print_json, say, table, word_of

if TYPE_CHECKING:
    from rlm_tasks.client.job import Job
    from rlm_tasks.client.planning import PlannedRound
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.results import ItemFailure, JobEvent, JobResult, Progress

SHOWN = 20
"""Events of a job that are shown to people: the last ones."""
NAMED = 8
"""Indexes of items that are shown for each kind of failure."""


@click.command()
@click.argument("request_file", type=click.File("r"), default="-")
@click.option(
    "--wait", "timeout", type=float, help="Wait this many seconds for the result and print it."
)
@as_json_option
@click.pass_context
def submit(ctx: click.Context, request_file: Any, timeout: float | None, as_json: bool) -> None:
    """Submit a request from a JSON file, or from stdin."""
    job = client_of(ctx).submit(_read(request_file))
    if timeout is None:
        answer({"id": job.id}, job.id, as_json)
        return
    _print_result(job.result(timeout), as_json)


def _read(request_file: Any) -> Any:
    from rlm_tasks.errors import InvalidRequest

    try:
        return json.load(request_file)
    except ValueError as error:
        raise InvalidRequest(
            "request", getattr(request_file, "name", "-"), f"is not JSON: {error}"
        ) from None


@click.command()
@click.argument("request_file", type=click.File("r"), default="-")
@as_json_option
@click.pass_context
def plan(ctx: click.Context, request_file: Any, as_json: bool) -> None:
    """Estimate a request from a JSON file or stdin: calls, tokens, money and time.

    Nothing is submitted.
    """
    planned = client_of(ctx).plan(_read(request_file))
    if as_json:
        print_json(planned.to_dict())
        return
    if planned.calls.p90:
        columns = (
            "round",
            "operation",
            "items",
            "calls",
            "calls p90",
            "tokens",
            "tokens p90",
            "money",
            "money p90",
        )
        table("Rounds", columns, map(_round, planned.rounds))
    say(str(planned))


def _round(planned: PlannedRound) -> tuple[Any, ...]:
    money = (f"{amount:,.4f}" for amount in (planned.money.p50, planned.money.p90))
    return (
        planned.number,
        planned.operation,
        planned.items,
        planned.calls.p50,
        planned.calls.p90,
        planned.tokens.p50,
        planned.tokens.p90,
        *money,
    )


@click.command()
@click.option("--limit", default=20, show_default=True, help="Number of jobs, the newest first.")
@click.option("--open", "only_open", is_flag=True, help="Of these, only jobs that have not ended.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids, one on each line.")
@as_json_option
@click.pass_context
def jobs(ctx: click.Context, limit: int, only_open: bool, quiet: bool, as_json: bool) -> None:
    """List jobs, the newest first."""
    rows = [
        (spec, at)
        for spec, at in client_of(ctx).listed(limit)
        if not (only_open and at.status.final)
    ]
    if as_json:
        print_json(
            [
                {"id": s.job, "operation": s.operation, "priority": s.priority, **_progress(at)}
                for s, at in rows
            ]
        )
    elif quiet:
        say("".join(f"{spec.job}\n" for spec, _ in rows), nl=False)
    else:
        columns = (
            "job",
            "operation",
            "priority",
            "status",
            "items",
            "done",
            "failed",
            "skipped",
            "nodes",
            "seconds",
        )
        table("Jobs", columns, (_row(spec, at) for spec, at in rows))


def _row(spec: JobSpec, at: Progress) -> tuple[Any, ...]:
    counts = (at.total, at.done, at.failed, at.skipped, at.nodes)
    word = word_of(at.status, at.failed, color=False)
    return (spec.job, spec.operation, spec.priority, word, *counts, f"{at.elapsed_s:.1f}")


def _progress(progress: Progress) -> dict[str, Any]:
    return {**asdict(progress), "fraction": progress.fraction}


@click.command()
@click.argument("job_id")
@click.option("--watch", is_flag=True, help="Show a progress bar until the job ends.")
@as_json_option
@click.pass_context
def job(ctx: click.Context, job_id: str, watch: bool, as_json: bool) -> None:
    """Show one job: its progress, why it waits or how it ended, its failures and its events."""
    handle = client_of(ctx).job(job_id)
    if watch:
        _watch(handle)
    progress, sentence, events, failures = (
        handle.progress(),
        handle.explain(),
        handle.events(),
        handle.failures(),
    )
    spent = handle.spent()
    if as_json:
        log = [asdict(event) for event in events]
        names = ("index", "type", "code", "where")
        failed = [{name: getattr(each, name) for name in names} for each in failures]
        about: dict[str, Any] = {
            "explain": sentence,
            "trace_id": handle.trace_id,
            "failures": failed,
            "events": log,
        }
        about |= {
            "rounds": [each.id for each in handle.rounds()],
            "spent": asdict(spent) if spent else None,
        }
        print_json({"id": job_id, **_progress(progress), **about})
        return
    say(
        f"{job_id}  {word_of(progress.status, progress.failed)}  {progress.fraction:.0%} "
        f"of {progress.total:,} items, {progress.nodes} nodes"
    )
    say(sentence)
    if client_of(ctx).settings.tracing.enabled:
        say(f"Trace: {handle.trace_id}")
    if failures:
        _show_failures(failures)
    if spent:
        from rlm_tasks.results import COLUMNS, rows

        table("Calls to models", COLUMNS, rows(spent))
        say(str(spent))
    _show_events(events)


def _show_failures(failures: list[ItemFailure]) -> None:
    """Print failures, one row for each type and code.

    Messages may contain an item, so only the job's result has them.
    """
    from rlm_tasks.jobs.item_failures import alike

    rows = (
        (type, code, len(indexes), _first_of(indexes)) for type, code, indexes in alike(failures)
    )
    table("Failures", ("type", "code", "items", "index"), rows)


def _first_of(indexes: list[int]) -> str:
    return ", ".join(map(str, indexes[:NAMED])) + (", ..." if len(indexes) > NAMED else "")


def _show_events(events: list[JobEvent]) -> None:
    began = events[0].at if events else 0.0
    table(
        "Events",
        ("after s", "event", "about"),
        ((f"{e.at - began:.3f}", e.event, e.detail) for e in events[-SHOWN:]),
    )
    if len(events) > SHOWN:
        say(f"--json prints {len(events) - SHOWN:,} earlier events, too")


@click.command()
@click.argument("job_id")
@as_json_option
@click.pass_context
def tree(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Show the tree of a job's nodes."""
    nodes = client_of(ctx).job(job_id).tree()
    if as_json:
        print_json([asdict(node) for node in nodes])
        return
    columns = ("node", "range", "worked", "state", "ms", "worker", "why")
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
    table(f"Nodes of {job_id}", columns, rows)
    if nodes.note:
        say(nodes.note)


@click.command()
@click.argument("job_id")
@as_json_option
@click.pass_context
def explain(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Print one sentence: why a job waits, what it does, or how it ended."""
    sentence = client_of(ctx).job(job_id).explain()
    answer({"id": job_id, "explain": sentence}, sentence, as_json)


@click.command()
@click.argument("job_id")
@as_json_option
@click.pass_context
def cancel(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Cancel a job with its whole tree."""
    handle = client_of(ctx).job(job_id)
    handle.cancel()
    answer({"id": job_id, "status": handle.status}, handle.explain(), as_json)


@click.command()
@click.argument("job_id")
@click.option("--reread", is_flag=True, help="Read failed lines anew: their file was mended.")
@as_json_option
@click.pass_context
def retry(ctx: click.Context, job_id: str, reread: bool, as_json: bool) -> None:
    """Open a new job on the failed items of a job that has ended."""
    again = client_of(ctx).job(job_id).retry_failed(reread=reread)
    answer({"id": again.id}, again.id, as_json)


def _print_result(result: JobResult, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    say(
        f"{word_of(result.status, result.failed_count)}: {result.done:,} done, "
        f"{result.failed_count:,} failed, {result.skipped:,} skipped"
    )
    say(str(result.output)[:2000])


def _watch(job: Job) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task(job.id)
        for progress in job.watch():
            ended = progress.done + progress.failed + progress.skipped
            bar.update(line, total=progress.total, completed=ended)


COMMANDS = (submit, plan, jobs, job, tree, explain, cancel, retry)
