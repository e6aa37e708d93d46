"""The output of commands: tables for people, JSON for programs, exit codes for errors.

All commands use it.  Celery loads the commands at each start, so heavy modules are imported when a
command runs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client
    from rlm_tasks.results import Status

_CONTROLS = re.compile(
    r"(?!\x1b\[[0-9;]{0,8}m)[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
EX_USAGE, EX_UNAVAILABLE, EX_FAILED = 2, 69, 1


class Polite(click.Group):
    """A group that prints our errors as one line and sets the exit code.

    2: invalid input.  69: Redis or the broker does not answer.  1: other errors, such as a failed
    job.  The message of an item's failure is shown only with RLM_SHOW_MESSAGES.
    """

    def invoke(self, ctx: click.Context) -> Any:
        from resilience.errors import InvalidValue
        from rlm_tasks.errors import RlmError, StoreUnavailable

        try:
            return super().invoke(ctx)
        except RlmError as error:
            outline = getattr(error, "outline", "")  # a failed job has one
            shown = outline if outline and not shows_messages(ctx) else error
            click.secho(f"Error: {printable(shown)}", fg="red", err=True)
            code = EX_USAGE if isinstance(error, InvalidValue) else EX_FAILED
            ctx.exit(EX_UNAVAILABLE if isinstance(error, StoreUnavailable) else code)


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def client_of(ctx: click.Context) -> Client:
    """Return a client of the app of ``celery -A``."""
    from rlm_tasks.client.client import Client

    app = getattr(ctx.obj, "app", None)
    return Client(app if hasattr(app, "rlm_settings") else None)


def shows_messages(ctx: click.Context) -> bool:
    """Whether commands show messages of failures, which may contain items."""
    return client_of(ctx).settings.show_messages


def say(text: str, **options: Any) -> None:
    """Print a text, without characters that control the terminal, as `click.echo` does."""
    click.echo(printable(text), **options)


def printable(value: object) -> str:
    """Return a value's text in which control characters are escapes; colours and lines stay.

    The text may come from a request, an exception or a model, which must not move the cursor.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    click.echo(json.dumps(document, default=str))


def answer(document: Any, sentence: str, as_json: bool) -> None:
    """Print a document for programs, or a sentence for people."""
    if as_json:
        print_json(document)
    else:
        say(sentence)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table as wide as the terminal, or 200 columns without one.

    Without rows, one line says so.
    """
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    if not rows:
        say(f"{title}: none")
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

    return f"{value:,}" if isinstance(value, int) else escape(printable(value))


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
