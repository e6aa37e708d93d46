"""The output of commands: tables and sentences for people, JSON for programs, exit codes.

All commands use it.  Tables and sentences fit the width of the screen.  Celery loads the commands
at each start, so heavy modules are imported when a command runs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.screen import printable as printable
from rlm_tasks.cli.screen import say as say
from rlm_tasks.cli.screen import screen_width, wrapped
from rlm_tasks.cli.screen import styled as styled
from rlm_tasks.cli.tables import colored as colored
from rlm_tasks.cli.tables import table as table
from rlm_tasks.cli.tables import wide_option as wide_option

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client
    from rlm_tasks.client.session import Session
    from rlm_tasks.results import Status

_SESSION = "rlm_tasks.session"
"""The place of the session in the memory of a command."""
EX_USAGE, EX_UNAVAILABLE, EX_FAILED = 2, 69, 1
_NARROW = 52
"""Click writes help as if a screen had this many columns at least."""


class Polite(click.Group):
    """A group that prints our errors as one line and sets the exit code.

    2: invalid input.  69: Redis or the broker does not answer.  1: other errors, such as a failed
    job.  The message of an item's failure is shown only with RLM_SHOW_MESSAGES.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return its context; help fits a screen that is narrower than click's 50 columns, too."""
        if (width := screen_width()) and width < _NARROW:
            extra = {"terminal_width": width, **extra}
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        from resilience.errors import InvalidValue
        from rlm_tasks.errors import RlmError, StoreUnavailable

        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            label = "Error: "  # `show` of the error prints it before the message
            text = wrapped(label + printable(error.format_message()), err=True)
            raise click.UsageError(text.removeprefix(label), error.ctx) from error
        except RlmError as error:
            outline = getattr(error, "outline", "")  # a failed job has one
            shown = outline if outline and not shows_messages(ctx) else error
            say(styled(f"Error: {shown}", fg="red"), err=True)
            code = EX_USAGE if isinstance(error, InvalidValue) else EX_FAILED
            ctx.exit(EX_UNAVAILABLE if isinstance(error, StoreUnavailable) else code)


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def client_of(ctx: click.Context) -> Client:
    """Return a client of the app of ``celery -A``."""
    from rlm_tasks.client.client import Client

    return Client(installed_app(getattr(ctx.obj, "app", None)))


def installed_app(app: Any) -> Any:
    """Return an app, or the default one if the platform is not installed in it."""
    from rlm_tasks.celery import default_app

    return app if hasattr(app, "rlm_settings") else default_app()


def session_of(ctx: click.Context) -> Session:
    """Return the parts of a client of the app of ``celery -A``, without its operations."""
    session: Session | None = ctx.meta.get(_SESSION)
    return session or ctx.meta.setdefault(_SESSION, new_session(getattr(ctx.obj, "app", None)))


def new_session(app: Any) -> Session:
    """Return the parts of a client of an app, or of the platform's own one."""
    from rlm_tasks.client.session import Session

    return Session(installed_app(app))


def shows_messages(ctx: click.Context) -> bool:
    """Whether commands show messages of failures, which may contain items."""
    return session_of(ctx).settings.show_messages


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    click.echo(json.dumps(document, default=str))


def answer(document: Any, sentence: str, as_json: bool) -> None:
    """Print a document for programs, or a sentence for people."""
    if as_json:
        print_json(document)
    else:
        say(sentence)


def word_of(status: Status, failed: int, *, color: bool = True) -> str:
    """Return the words for a status of a job with this number of failed items."""
    from rlm_tasks.jobs.endings import shown

    word, tone = shown(status, failed)
    return colored(word, tone) if color else word
