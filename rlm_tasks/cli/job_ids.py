"""The argument JOB of commands: an id, or the beginning of it, completed from the newest jobs.

Commands that only read get a job from `job_of`, which imports no operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.output import new_session, say, session_of

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from rlm_tasks.client.job import Job
    from rlm_tasks.client.session import Session

COMPLETED = 200
"""A completion looks at this many of the newest jobs."""
SHORT_ID = 8
"""Lists show this many characters of an id."""
INTERRUPTED = 130
"""The exit code of shells for a command that Ctrl-C has ended."""


def job_of(ctx: click.Context, job_id: str) -> Job:
    """Return a job by its id or the beginning of it.  Raises JobNotFound, InvalidRequest."""
    from rlm_tasks.client.job import Job
    from rlm_tasks.client.job_search import full_id

    session = session_of(ctx)
    return Job(session, full_id(session.ledger, job_id))


def short(job: str) -> str:
    """Return the beginning of an id, as lists show it."""
    return job[:SHORT_ID]


def command(ctx: click.Context, name: str, job: str = "") -> str:
    """Return a command of this app to type: ``celery -A shop rlm watch 4ac56bc0``."""
    from rlm_tasks.installation import command_of

    return " ".join(filter(None, (command_of(session_of(ctx).app), "rlm", name, short(job))))


@contextmanager
def goes_on(ctx: click.Context, job: Job) -> Iterator[None]:
    """Let Ctrl-C end this command only, and say that the job goes on."""
    try:
        yield
    except KeyboardInterrupt:
        say(
            f"\nJob {short(job.id)} goes on. To cancel it: {command(ctx, 'cancel', job.id)}",
            err=True,
        )
        ctx.exit(INTERRUPTED)


def _newest_ids(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the newest jobs whose ids begin so, with operation and age; none on any error."""
    from click.shell_completion import CompletionItem

    from rlm_tasks.client.job_search import listed, newest
    from rlm_tasks.words import age

    try:
        ledger = _session_to_complete(ctx).ledger
        ids = newest(ledger, COMPLETED, None, None, None)
        begun = [each for each in ids if each.startswith(incomplete)]
        now = ledger.clock()
        return [
            CompletionItem(
                spec.job if len(incomplete) > SHORT_ID else short(spec.job),
                help=f"{spec.operation}, {at.status}, {age(now - at.submitted_at)}",
            )
            for spec, at in listed(ledger, begun)
        ]
    except Exception:  # a completion must not print a traceback into the user's line
        return []


def _session_to_complete(ctx: click.Context) -> Session:
    """Return the session for a completion, for which Celery's own group has not run."""
    from celery.app.utils import find_app

    named: Any = ctx.find_root().params.get("app")
    return new_session(find_app(named) if isinstance(named, str) else named)


job_argument = click.argument("job_id", metavar="JOB", shell_complete=_newest_ids)
