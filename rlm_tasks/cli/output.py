"""How commands answer: tables for people, JSON for programs, one sentence and an exit code for a
mistake.

Celery loads the commands at every start, so what is heavy is imported when a command runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client

EX_USAGE, EX_UNAVAILABLE, EX_FAILED = 2, 69, 1


class Polite(click.Group):
    """Turn our errors into one line and an exit code: 2 bad input, 69 no Redis, 1 a job without its
    answer.
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
    """Return a client of the app that ``-A`` names."""
    from rlm_tasks.client.client import Client

    app = getattr(ctx.obj, "app", None)
    return Client(app if hasattr(app, "rlm_settings") else None)


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    click.echo(json.dumps(document, default=str))


def answer(document: Any, sentence: str, as_json: bool) -> None:
    """Print a document for programs, or what it comes to for people."""
    if as_json:
        print_json(document)
    else:
        click.echo(sentence)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table, as wide as the terminal, or 200 columns where there is none; without rows a
    word of that.
    """
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    if not rows:
        click.echo(f"{title}: none")
        return
    made = Table(title=title or None, title_justify="left")
    for at, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=at == 0)
    for row in rows:
        made.add_row(*(cell_of(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(made)


def cell_of(value: Any) -> str:
    """Return a cell: whole numbers in groups of three, others as they are; what would be markup is
    text.
    """
    from rich.markup import escape

    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def ago(at: float, now: float) -> str:
    """Return how long ago something was, in the largest fitting unit."""
    seconds = max(0.0, now - at)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
