"""Commands for quarantined items: list, show, replay, drop."""

from __future__ import annotations

from dataclasses import asdict

import click

from rlm_tasks.cli.job_ids import command, job_argument, job_of, short
from rlm_tasks.cli.output import (
    answer,
    as_json_option,
    client_of,
    print_json,
    say,
    table,
    wide_option,
)


@click.group()
def quarantine() -> None:
    """Items that no longer run, because their process died too often."""


@quarantine.command("list")
@click.option("--job", "job_id", help="Only items of this job.")
@wide_option
@as_json_option
@click.pass_context
def list_quarantine(ctx: click.Context, job_id: str | None, as_json: bool) -> None:
    """List quarantined items, the newest job first."""
    items = job_of(ctx, job_id).quarantined() if job_id else client_of(ctx).quarantine()
    if as_json:
        print_json([asdict(item) for item in items])
        return
    if not items:
        say("Nothing is in quarantine.")
        return
    rows = (
        (short(i.job_id), i.index, i.operation, i.attempts, i.last_signal, i.item) for i in items
    )
    columns = ("job", "index", "operation", "deaths", "died of", "item")
    table("Quarantine", columns, rows, minor=("deaths", "operation", "died of"))
    say(f"When the cause is fixed: {command(ctx, 'quarantine')} replay JOB [INDEX ...]")
    say(f"To delete: {command(ctx, 'quarantine')} drop JOB [INDEX ...]")


@quarantine.command("show")
@job_argument
@click.argument("index", type=int)
@as_json_option
@click.pass_context
def show_quarantined(ctx: click.Context, job_id: str, index: int, as_json: bool) -> None:
    """Show one quarantined item: its place in the input, attempts, and last cause of death."""
    from rlm_tasks.errors import InvalidRequest

    items = {item.index: item for item in job_of(ctx, job_id).quarantined()}
    if index not in items:
        raise InvalidRequest(
            "index", index, f"is not in quarantine; in job {job_id} there are {sorted(items)}"
        )
    about = asdict(items[index])
    if as_json:
        print_json(about)
        return
    for name, value in about.items():
        say(f"{name.replace('_', ' '):12} {value}", hang=13)


@quarantine.command()
@job_argument
@click.argument("indexes", type=int, nargs=-1)
@as_json_option
@click.pass_context
def replay(ctx: click.Context, job_id: str, indexes: tuple[int, ...], as_json: bool) -> None:
    """Open a new job on quarantined items, all or the given ones; they leave quarantine."""
    again = client_of(ctx).job(job_id).replay_quarantined(*indexes)
    answer({"id": again.id}, again.id, as_json)


@quarantine.command()
@job_argument
@click.argument("indexes", type=int, nargs=-1)
@as_json_option
@click.pass_context
def drop(ctx: click.Context, job_id: str, indexes: tuple[int, ...], as_json: bool) -> None:
    """Delete quarantined items, all or the given ones."""
    from rlm_tasks.words import count

    dropped = job_of(ctx, job_id).drop_quarantined(*indexes)
    answer({"dropped": dropped}, f"{count(len(dropped), 'item')} dropped", as_json)


COMMANDS = (quarantine,)
