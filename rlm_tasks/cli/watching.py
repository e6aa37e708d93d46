"""The command `watch`: the progress of a job until it has ended, live or as lines of a log."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from rlm_tasks.cli.job_ids import command, goes_on, job_argument, job_of, short
from rlm_tasks.cli.output import printable, say, shows_messages

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rlm_tasks.client.job import Job
    from rlm_tasks.results import Progress

QUIET_S = 1.0
"""A job whose counts stay the same for this time is asked why."""
_NUMBERS = re.compile(r"[\d.,]+")


@click.command()
@job_argument
@click.pass_context
def watch(ctx: click.Context, job_id: str) -> None:
    """Show a job's progress until it has ended, and the reason while it waits.

    A pipe gets one line for each change.  The exit code is 1 for a job without a full answer.
    Ctrl-C ends the watching; the job goes on.
    """
    watch_to_the_end(ctx, job_of(ctx, job_id))


def watch_to_the_end(ctx: click.Context, job: Job) -> None:
    """Show the progress of a job and its outcome; exit with 1 when it has no full answer."""
    from rlm_tasks.jobs.endings import ENDINGS

    with goes_on(ctx, job):
        last = show_live(ctx, job) if _is_screen() else _print_changes(ctx, job)
    say(sentence_about(ctx, job))
    if last.failed:
        say(f"Failed items: {command(ctx, 'failures', job.id)}")
    if ENDINGS[last.status].error is not None:
        ctx.exit(1)
    say(f"Answer: {command(ctx, 'result', job.id)}")


def _is_screen() -> bool:
    """Whether stdout is a terminal whose lines can be drawn anew."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def explained(ctx: click.Context, job: Job) -> str:
    """Return why a job waits, or how it ended; the message of an error only if it may be shown."""
    return job.explain(message=shows_messages(ctx))


def sentence_about(ctx: click.Context, job: Job) -> str:
    """Return the same with the job as the subject: "Job 4ac56bc0 succeeded: ..."."""
    sentence = explained(ctx, job)
    if sentence.startswith("It "):
        return f"Job {short(job.id)} {sentence.removeprefix('It ')}"
    return f"Job {short(job.id)}: {sentence}"


class Reasons:
    """Asks why a job stands still: once its counts are the same for a second, then each second."""

    def __init__(self, explain: Callable[[], str]) -> None:
        self._explain = explain
        self._seen: tuple[object, ...] = ()
        self._since = self._asked = time.monotonic()
        self._reason = ""

    def of(self, progress: Progress) -> str:
        """Return why the job waits, '' while it moves."""
        from rlm_tasks.errors import StoreUnavailable

        now = time.monotonic()
        if (counts := counts_of(progress)) != self._seen or progress.status.final:
            self._seen, self._since, self._reason = counts, now, ""
        elif now - max(self._since, self._asked) >= QUIET_S:
            self._asked = now
            try:
                self._reason = self._explain()
            except StoreUnavailable as error:
                self._reason = str(error)
        return self._reason


def counts_of(progress: Progress) -> tuple[object, ...]:
    """Return what a watcher sees move."""
    at = progress
    return (at.status, at.phase, at.round, at.total, at.done, at.failed, at.skipped)


def ended_items(progress: Progress) -> int:
    """Return the number of items that are done, failed or skipped."""
    return progress.done + progress.failed + progress.skipped


def share_of(progress: Progress) -> float:
    """Return the share of items that ran, 0 to 1; skipped items do not count."""
    return (progress.done + progress.failed) / progress.total if progress.total else 1.0


def facts_of(progress: Progress) -> str:
    """Return status, share, failures, rate and remaining time: "running, 12%, 3 failed"."""
    from rlm_tasks.jobs.endings import shown_progress, shown_rate
    from rlm_tasks.words import duration

    at = progress
    parts = [shown_progress(at)[0], f"{share_of(at):.0%}"]
    parts += [f"{at.failed:,} failed"] if at.failed else []
    parts += [f"{at.skipped:,} skipped"] if at.skipped else []
    parts += [f"round {at.round}"] if at.round else []
    parts += ["validating"] if at.phase == "validate" else []
    if not at.status.final:
        parts += [f"{rate:,.1f}/s"] if (rate := shown_rate(at)) else []
        parts += [f"{duration(at.eta_s)} left"] if at.eta_s else []
    return ", ".join(parts)


# --- in a pipe --------------------------------------------------------------------------------


def _print_changes(ctx: click.Context, job: Job) -> Progress:
    """Print a line for each change of the counts, and for each new reason; return the last state.

    The numbers in a reason, such as the seconds it has waited, make no new reason.
    """
    reasons, seen, told = Reasons(lambda: explained(ctx, job)), None, ""
    for progress in job.watch(QUIET_S / 2):
        if (counts := counts_of(progress)) != seen:
            seen, told = counts, ""
            items = f"{ended_items(progress):,} of {progress.total:,} items"
            say(f"{_clock()} {short(job.id)} {items}, {facts_of(progress)}")
        reason = reasons.of(progress)
        if (words := _NUMBERS.sub("", reason)) != told and reason:
            told = words
            say(f"{_clock()} {short(job.id)} {reason}")
    return progress


def _clock() -> str:
    from rlm_tasks.words import clock

    return clock(time.time())


# --- in a terminal ----------------------------------------------------------------------------


def show_live(ctx: click.Context, job: Job, *, err: bool = False) -> Progress:
    """Show a bar, the counts, the rate and the reason for a wait; return the last progress."""
    from rich.console import Console
    from rich.live import Live

    reasons = Reasons(lambda: explained(ctx, job))
    with Live(console=Console(stderr=err), transient=True, auto_refresh=False) as live:
        for progress in job.watch():
            live.update(_picture(job, progress, reasons.of(progress)), refresh=True)
    return progress


def _picture(job: Job, progress: Progress, reason: str) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, 1, None):
        bar.add_column(ratio=ratio, no_wrap=True)
    ended, total = ended_items(progress), progress.total
    bar.add_row(
        short(job.id),
        ProgressBar(total=max(total, 1), completed=ended if total else 1),
        f"{ended:,} of {total:,}",
    )
    lines = [Text(facts_of(progress))]
    lines += [Text(printable(reason), style="yellow")] if reason else []
    return Group(bar, *lines)


COMMANDS = (watch,)
