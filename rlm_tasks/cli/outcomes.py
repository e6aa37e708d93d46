"""Commands for what a job has brought so far: its result, its failures, its events."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.job_ids import command, goes_on, job_argument, job_of, short
from rlm_tasks.cli.output import (
    as_json_option,
    client_of,
    print_json,
    printable,
    say,
    shows_messages,
    table,
    wide_option,
    word_of,
)
from rlm_tasks.cli.watching import explained

if TYPE_CHECKING:
    from rlm_tasks.results import ItemFailure, JobEvent, JobResult

OUTPUTS = 20
"""Outputs of a job without a merge that are shown to people."""
CHARACTERS = 2000
"""Characters of an output that are shown to people."""


# --- the result -------------------------------------------------------------------------------


@click.command()
@job_argument
@click.option("--wait", "wait_s", type=float, default=0.0, help="Wait this many seconds for it.")
@as_json_option
@click.pass_context
def result(ctx: click.Context, job_id: str, wait_s: float, as_json: bool) -> None:
    """Print the result of a job.

    The exit code is 1 for a job without a full answer, and for one that still runs.
    """
    from rlm_tasks.errors import JobEnded, ResultTimeout

    job = client_of(ctx).job(job_id)
    try:
        with goes_on(ctx, job):
            job.wait(wait_s)
    except ResultTimeout:
        say(explained(ctx, job), err=True)
        wait = f"{command(ctx, 'result', job.id)} --wait 60"
        say(f"Job {short(job.id)} has not ended. To wait for it: {wait}", err=True)
        ctx.exit(1)
    try:
        found, ended = job.result(), None
    except JobEnded as error:
        found, ended = error.result, error
    print_result(ctx, found, as_json)
    if ended is not None and not as_json:
        say(explained(ctx, job), err=True)
    if found.failed_count and not as_json:
        say(f"Failed items: {command(ctx, 'failures', job.id)}", err=True)
    ctx.exit(0 if ended is None else 1)


def print_result(ctx: click.Context, result: JobResult, as_json: bool) -> None:
    """Print a result: all of it for programs, counts and the first outputs for people."""
    if as_json:
        print_json(result.to_dict(messages=shows_messages(ctx)))
        return
    say(
        f"{word_of(result.status, result.failed_count)}: {result.done:,} done, "
        f"{result.failed_count:,} failed, {result.skipped:,} skipped"
    )
    _show_output(result)


def _show_output(result: JobResult) -> None:
    from rlm_tasks.results import Outputs, Status

    if result.status is not Status.SUCCEEDED:
        return
    if not isinstance(result.output, Outputs):
        click.echo(_brief(result.output))
        return
    for index, output in zip(result.successful[:OUTPUTS], result.output, strict=False):
        click.echo(f"{index}: {_brief(output)}")
    if len(result.output) > OUTPUTS:
        say(f"and {len(result.output) - OUTPUTS:,} more; --json prints all")


def _brief(output: Any) -> str:
    text = printable(output)
    if len(text) <= CHARACTERS:
        return text
    return f"{text[:CHARACTERS]}... ({len(text):,} characters; --json prints all)"


# --- failures ---------------------------------------------------------------------------------


@click.command()
@job_argument
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="Most rows.")
@wide_option
@as_json_option
@click.pass_context
def failures(ctx: click.Context, job_id: str, limit: int, as_json: bool) -> None:
    """List the failed items of a job: kind, code, index, place in the input.

    Messages may contain items, so they are shown with RLM_SHOW_MESSAGES=1 only.
    """
    job = job_of(ctx, job_id)
    found, shows = job.failures(), shows_messages(ctx)
    if as_json:
        names = ("index", "type", "code", "where", *(("message", "traceback") if shows else ()))
        print_json([{name: getattr(each, name) for name in names} for each in found])
        return
    failed = job.progress().failed
    if not found:
        say(f"No item of job {short(job.id)} has failed. {explained(ctx, job)}")
        return
    _show_failures(found[:limit], shows)
    if failed > limit or failed > len(found):
        say(f"The first {min(limit, len(found)):,} of {failed:,} failed items")
    if not shows:
        say("RLM_SHOW_MESSAGES=1 shows messages; they may contain items")
    if job.ready():
        say(f"To run them again: {command(ctx, 'retry', job.id)}")


def _show_failures(found: list[ItemFailure], shows: bool) -> None:
    last = "where and message" if shows else "where"
    rows = ((each.type, each.code, each.index, _place(each, shows)) for each in found)
    table("Failures", ("kind", "code", "index", last), rows, minor=("code",))


def _place(failure: ItemFailure, shows: bool) -> str:
    return ": ".join(filter(None, (failure.where, failure.message if shows else "")))


# --- events -----------------------------------------------------------------------------------


@click.command()
@job_argument
@click.option("--follow", "-f", is_flag=True, help="Print new events until the job has ended.")
@as_json_option
@click.pass_context
def events(ctx: click.Context, job_id: str, follow: bool, as_json: bool) -> None:
    """Print the newest thousand events of a job; with --follow --json one document a line."""
    job = job_of(ctx, job_id)
    if as_json and not follow:
        print_json([asdict(each) for each in job.events()])
        return
    with goes_on(ctx, job):
        for each in job.follow() if follow else job.events():
            if as_json:
                click.echo(json.dumps(asdict(each)))
            else:
                say(_line(each), hang=2)


def _line(event: JobEvent) -> str:
    from rlm_tasks.words import clock

    return f"{clock(event.at)}  {event.event:10}  {event.detail}".rstrip()


COMMANDS = (result, failures, events)
