"""Commands for quarantined items: list, show, replay, drop."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from rlm_tasks.cli.output import answer, as_json_option, client_of, print_json, say, table


@click.group()
def quarantine() -> None:
    """Items that no longer run, because their process died too often."""


@quarantine.command("list")
@click.option("--job", "job_id", help="Only items of this job.")
@as_json_option
@click.pass_context
def list_quarantine(ctx: click.Context, job_id: str | None, as_json: bool) -> None:
    """List quarantined items, the newest job first."""
    client = client_of(ctx)
    items = client.job(job_id).quarantined() if job_id else client.quarantine()
    if as_json:
        print_json([asdict(item) for item in items])
        return
    if not items:
        say("Nothing is in quarantine.")
        return
    columns = ("job", "index", "operation", "item", "attempts", "died of")
    rows = ((i.job_id, str(i.index), i.operation, i.item, i.attempts, i.last_signal) for i in items)
    table("Quarantine", columns, rows)
    say(
        "When the cause is fixed: rlm quarantine replay JOB [INDEX ...]; "
        "to delete: rlm quarantine drop JOB [INDEX ...]"
    )


@quarantine.command("show")
@click.argument("job_id")
@click.argument("index", type=int)
@as_json_option
@click.pass_context
def show_quarantined(ctx: click.Context, job_id: str, index: int, as_json: bool) -> None:
    """Show one quarantined item: its place in the input, attempts, and last cause of death."""
    from rlm_tasks.errors import InvalidRequest

    items = {item.index: item for item in client_of(ctx).job(job_id).quarantined()}
    if index not in items:
        raise InvalidRequest(
            "index", index, f"is not in quarantine; in job {job_id} there are {sorted(items)}"
        )
    about = asdict(items[index])
    say(
        json.dumps(about)
        if as_json
        else "\n".join(f"{name.replace('_', ' '):12} {value}" for name, value in about.items())
    )


@quarantine.command()
@click.argument("job_id")
@click.argument("indexes", type=int, nargs=-1)
@as_json_option
@click.pass_context
def replay(ctx: click.Context, job_id: str, indexes: tuple[int, ...], as_json: bool) -> None:
    """Open a new job on quarantined items, all or the given ones; they leave quarantine."""
    again = client_of(ctx).job(job_id).replay_quarantined(*indexes)
    answer({"id": again.id}, again.id, as_json)


@quarantine.command()
@click.argument("job_id")
@click.argument("indexes", type=int, nargs=-1)
@as_json_option
@click.pass_context
def drop(ctx: click.Context, job_id: str, indexes: tuple[int, ...], as_json: bool) -> None:
    """Delete quarantined items, all or the given ones."""
    dropped = client_of(ctx).job(job_id).drop_quarantined(*indexes)
    answer({"dropped": dropped}, f"{len(dropped)} dropped", as_json)


COMMANDS = (quarantine,)
