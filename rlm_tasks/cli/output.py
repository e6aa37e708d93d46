"""The output of commands: tables for people, JSON for programs, exit codes for errors.

All commands use it.  Celery loads the commands at each start, so heavy modules are imported when a
command runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client
    from rlm_tasks.results import Status

EX_USAGE, EX_UNAVAILABLE, EX_FAILED = 2, 69, 1


class Polite(click.Group):
    """A group that prints our errors as one line and sets the exit code.

    2: invalid input.  69: Redis or the broker does not answer.  1: other errors, such as a failed
    job.
    """

    def invoke(self, ctx: click.Context) -> Any:
        from resilience.errors import InvalidValue
        from rlm_tasks.errors import RlmError, StoreUnavailable

        try:
            return super().invoke(ctx)
        except RlmError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            code = EX_USAGE if isinstance(error, InvalidValue) else EX_FAILED
            ctx.exit(EX_UNAVAILABLE if isinstance(error, StoreUnavailable) else code)


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def client_of(ctx: click.Context) -> Client:
    """Return a client of the app of ``celery -A``."""
    from rlm_tasks.client.client import Client

    app = getattr(ctx.obj, "app", None)
    return Client(app if hasattr(app, "rlm_settings") else None)


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    click.echo(json.dumps(document, default=str))


def answer(document: Any, sentence: str, as_json: bool) -> None:
    """Print a document for programs, or a sentence for people."""
    if as_json:
        print_json(document)
    else:
        click.echo(sentence)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table as wide as the terminal, or 200 columns without one.

    Without rows, one line says so.
    """
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    if not rows:
        click.echo(f"{title}: none")
        return
    printed = Table(title=title or None, title_justify="left")
    for at, column in enumerate(columns):
        printed.add_column(column, overflow="fold", no_wrap=at == 0)
    for row in rows:
        printed.add_row(*(cell_of(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(printed)


def cell_of(value: Any) -> str:
    """Return the text of a cell: integers in groups of three digits, markup as plain text."""
    from rich.markup import escape

    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def word_of(status: Status, failed: int, *, color: bool = True) -> str:
    """Return the words for a status of a job with this number of failed items."""
    from rlm_tasks.jobs.endings import shown

    word, tone = shown(status, failed)
    return click.style(word, fg="yellow") if color and tone == "warning" else word


def ago(at: float, now: float) -> str:
    """Return the age of a time in the largest fitting unit, such as "3 min ago"."""
    seconds = max(0.0, now - at)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
