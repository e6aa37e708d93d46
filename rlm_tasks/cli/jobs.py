"""``celery -A rlm_tasks rlm ...``: jobs and the demo from the command line.

Decides what is printed, for people as tables and with ``--json`` for programs; never a traceback for a user's
mistake.  Celery loads this module at every start, so heavy imports wait until a command runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rlm_tasks.client import Client
    from rlm_tasks.demo import Compared, Outcome
    from rlm_tasks.job import Job
    from rlm_tasks.results import JobResult, Progress

EX_USAGE, EX_UNAVAILABLE, EX_FAILED = 2, 69, 1


class _Polite(click.Group):
    """Turn our errors into one line and an exit code: 2 bad input, 69 no Redis, 1 a job without its answer."""

    def invoke(self, ctx: click.Context) -> Any:
        from rlm_tasks.errors import InvalidRequest, RlmError, StoreUnavailable

        try:
            return super().invoke(ctx)
        except RlmError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            code = EX_USAGE if isinstance(error, InvalidRequest) else EX_FAILED
            ctx.exit(EX_UNAVAILABLE if isinstance(error, StoreUnavailable) else code)


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group(cls=_Polite, name="rlm")
@click.pass_context
def rlm(_ctx: click.Context, /, **_: Any) -> None:
    """Jobs that split themselves: submit, watch, explain, cancel."""


def _client(ctx: click.Context) -> Client:
    from rlm_tasks.client import Client

    app = getattr(ctx.obj, "app", None)
    return Client(app if hasattr(app, "rlm_settings") else None)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=at == 0)
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


# --- jobs --------------------------------------------------------------------------------------------


@rlm.command()
@click.argument("request_file", type=click.File("r"), default="-")
@click.option("--wait", "timeout", type=float, help="Wait this many seconds for the result and print it.")
@_as_json
@click.pass_context
def submit(ctx: click.Context, request_file: Any, timeout: float | None, as_json: bool) -> None:
    """Submit a request from a JSON file, or from stdin."""
    from rlm_tasks.errors import InvalidRequest

    try:
        request = json.load(request_file)
    except ValueError as error:
        raise InvalidRequest("request", getattr(request_file, "name", "-"), f"is not JSON: {error}") from None
    job = _client(ctx).submit(request)
    if timeout is None:
        click.echo(json.dumps({"id": job.id}) if as_json else job.id)
        return
    _print_result(job.result(timeout), as_json)


@rlm.command()
@click.option("--limit", default=20, show_default=True, help="How many, the newest first.")
@_as_json
@click.pass_context
def jobs(ctx: click.Context, limit: int, as_json: bool) -> None:
    """List jobs, the newest first."""
    from rlm_tasks.errors import JobNotFound

    rows = []
    for job in _client(ctx).jobs(limit):
        try:
            rows.append((job.id, job.progress()))
        except JobNotFound:
            continue  # its ledger has expired between two reads
    if as_json:
        click.echo(json.dumps([{"id": id, **_progress(progress)} for id, progress in rows]))
        return
    columns = ("job", "status", "items", "done", "failed", "skipped", "nodes", "seconds")
    _table(
        "Jobs", columns, ((id, p.status, p.total, p.done, p.failed, p.skipped, p.nodes, f"{p.elapsed_s:.1f}") for id, p in rows)
    )


def _progress(progress: Progress) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(progress), "fraction": progress.fraction}


@rlm.command()
@click.argument("job_id")
@click.option("--watch", is_flag=True, help="Show a progress bar until the job ends.")
@_as_json
@click.pass_context
def job(ctx: click.Context, job_id: str, watch: bool, as_json: bool) -> None:
    """Show one job: how far it is, and why it waits or how it ended."""
    found = _client(ctx).job(job_id)
    if watch:
        _watch(found)
    progress, sentence = found.progress(), found.explain()
    if as_json:
        click.echo(json.dumps({"id": job_id, **_progress(progress), "explain": sentence}))
        return
    click.echo(f"{job_id}  {progress.status}  {progress.fraction:.0%} of {progress.total:,} items, {progress.nodes} nodes")
    click.echo(sentence)


@rlm.command()
@click.argument("job_id")
@_as_json
@click.pass_context
def tree(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Show the tree of a job's nodes."""
    from dataclasses import asdict

    nodes = _client(ctx).job(job_id).tree()
    if as_json:
        click.echo(json.dumps([asdict(node) for node in nodes]))
        return
    columns = ("node", "range", "worked", "state", "ms", "worker", "why")
    rows = (("  " * n.depth + n.id, f"[{n.lo}, {n.hi})", n.worked, n.state, int(n.duration_ms), n.worker, n.why) for n in nodes)
    _table(f"Nodes of {job_id}", columns, rows)


@rlm.command()
@click.argument("job_id")
@_as_json
@click.pass_context
def explain(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Say in one sentence why a job waits or how it ended."""
    sentence = _client(ctx).job(job_id).explain()
    click.echo(json.dumps({"id": job_id, "explain": sentence}) if as_json else sentence)


@rlm.command()
@click.argument("job_id")
@_as_json
@click.pass_context
def cancel(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Cancel a job with its whole tree."""
    found = _client(ctx).job(job_id)
    found.cancel()
    click.echo(json.dumps({"id": job_id, "status": found.status}) if as_json else found.explain())


@rlm.command()
@click.argument("job_id")
@_as_json
@click.pass_context
def retry(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Open a new job on the failed items of an ended one."""
    again = _client(ctx).job(job_id).retry_failed()
    click.echo(json.dumps({"id": again.id}) if as_json else again.id)


# --- quarantine --------------------------------------------------------------------------------------


@rlm.group()
def quarantine() -> None:
    """Items that are not run again, because their process died too often while they ran."""


@quarantine.command("list")
@click.option("--job", "job_id", help="Of one job only.")
@_as_json
@click.pass_context
def list_quarantine(ctx: click.Context, job_id: str | None, as_json: bool) -> None:
    """List quarantined items, those of the newest job first."""
    from dataclasses import asdict

    client = _client(ctx)
    items = client.job(job_id).quarantined() if job_id else client.quarantine()
    if as_json:
        click.echo(json.dumps([asdict(item) for item in items]))
        return
    if not items:
        click.echo("Nothing is in quarantine.")
        return
    columns = ("job", "index", "operation", "item", "attempts", "died of")
    rows = ((i.job_id, str(i.index), i.operation, i.item, i.attempts, i.last_signal) for i in items)
    _table("Quarantine", columns, rows)
    click.echo("Once the cause is mended: rlm quarantine replay JOB [INDEX ...]; to forget: rlm quarantine drop JOB [INDEX ...]")


@quarantine.command("show")
@click.argument("job_id")
@click.argument("index", type=int)
@_as_json
@click.pass_context
def show_quarantined(ctx: click.Context, job_id: str, index: int, as_json: bool) -> None:
    """Show one quarantined item: where it lies, how often it was tried, what it did."""
    from dataclasses import asdict

    from rlm_tasks.errors import InvalidRequest

    items = {item.index: item for item in _client(ctx).job(job_id).quarantined()}
    if index not in items:
        raise InvalidRequest("index", index, f"is not in quarantine; in job {job_id} there are {sorted(items)}")
    about = asdict(items[index])
    click.echo(
        json.dumps(about) if as_json else "\n".join(f"{name.replace('_', ' '):12} {value}" for name, value in about.items())
    )


@quarantine.command()
@click.argument("job_id")
@click.argument("indexes", type=int, nargs=-1)
@_as_json
@click.pass_context
def replay(ctx: click.Context, job_id: str, indexes: tuple[int, ...], as_json: bool) -> None:
    """Open a new job on quarantined items, all of them or those named, and take them out of quarantine."""
    again = _client(ctx).job(job_id).replay_quarantined(*indexes)
    click.echo(json.dumps({"id": again.id}) if as_json else again.id)


@quarantine.command()
@click.argument("job_id")
@click.argument("indexes", type=int, nargs=-1)
@_as_json
@click.pass_context
def drop(ctx: click.Context, job_id: str, indexes: tuple[int, ...], as_json: bool) -> None:
    """Forget quarantined items, all of them or those named."""
    dropped = _client(ctx).job(job_id).drop_quarantined(*indexes)
    click.echo(json.dumps({"dropped": dropped}) if as_json else f"{len(dropped)} dropped")


def _print_result(result: JobResult, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.to_dict(), default=str))
        return
    click.echo(f"{result.status}: {result.done:,} done, {result.failed_count:,} failed, {result.skipped:,} skipped")
    click.echo(str(result.output)[:2000])


def _watch(job: Job) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task(job.id)
        for seen in job.watch():
            bar.update(line, total=seen.total, completed=seen.done + seen.failed + seen.skipped)


# --- the demo ----------------------------------------------------------------------------------------


@rlm.command()
@click.option(
    "--path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of Python files; default: the standard library.",
)
@click.option("--slots", default=2, show_default=True, type=click.IntRange(1), help="Processes of the demo's worker.")
@click.option("--compare", is_flag=True, help="Also run it serially and with a plain Celery chord.")
@_as_json
def demo(path: Path | None, slots: int, compare: bool, as_json: bool) -> None:
    """Measure a folder of Python files with a worker of the demo's own."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from rlm_tasks import demo as main_job
    from rlm_tasks import embedded
    from rlm_tasks.code_metrics import standard_library

    embedded.clean_up_on_sigterm()

    notes = Console(stderr=True)
    folder = path or standard_library()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with notes.status("starting a server and a worker"):
        platform = main_job.platform(slots)
        client, environment, logs = platform.__enter__()
    try:
        with Progress(*columns, console=notes) as bar:
            line = bar.add_task("measuring", total=None)

            def show(seen: Any) -> None:
                done = seen.done + seen.failed + seen.skipped
                bar.update(line, total=seen.total, completed=done, description=f"{seen.nodes} nodes, {seen.splits} splits")

            outcome, paths = main_job.run(client, folder, slots, show)
        others = []
        if compare:
            with notes.status("comparing"):
                others = list(main_job.compare(environment, logs, outcome, paths))
    finally:
        platform.__exit__(*sys.exc_info())
    if as_json:
        click.echo(json.dumps({**outcome.to_dict(), "compared": [_row(each) for each in others]}, default=str))
        return
    _show_report(outcome)
    _show_run(outcome, others)


def _row(each: Compared) -> dict[str, Any]:
    return {"name": each.name, "wall_s": each.wall_s, "same_report": each.same_report}


def _show_report(outcome: Outcome) -> None:
    report, folder = outcome.result.output, Path(outcome.folder)
    deepest, where = report["deepest"]
    names = ("files", "lines", "functions", "classes", "branches")
    click.echo(f"Python files below {folder}")
    _table("", ("what", "count"), [(name, report[name]) for name in names])
    click.echo(f"Deepest nesting: {deepest} levels, in {_short(where, folder)}\n")
    rows = ((count, name, f"{_short(path, folder)}:{line}") for count, path, line, name in report["complex"])
    _table("The ten most complex functions", ("branches + 1", "function", "where"), rows)
    if outcome.result.failed_count:
        click.echo(f"{outcome.result.failed_count} files could not be parsed:")
        for failure in outcome.result.failed[:5]:
            click.echo(f"  item {failure.index}: {failure.type}: {failure.message.replace(str(folder), '...')}")
        click.echo("  ..." if outcome.result.failed_count > 5 else "")


def _short(path: str, folder: Path) -> str:
    return str(Path(path).relative_to(folder)) if path else "-"


def _show_run(outcome: Outcome, others: list[Compared]) -> None:
    metrics = outcome.result.metrics
    rows: list[tuple[str, Any]] = [
        ("wall time", f"{outcome.wall_s:.2f} s on {outcome.slots} slots"),
        ("nodes", metrics.nodes),
        ("splits, and tail calls", f"{metrics.splits}, and {metrics.yields}"),
        ("deepest node", metrics.max_depth),
        ("slots' busy share", f"{outcome.busy_share:.0%}"),
        ("speed-up (summed item time over wall time)", f"{outcome.speed_up:.2f}"),
        ("largest worker process", f"{metrics.peak_memory_mb:.0f} MB"),
        ("under pressure", str(outcome.result.receipt)),
    ]
    _table("How it ran", ("what", "figure"), rows)
    if others:
        mine = ("RLM Tasks, no chunk size given", f"{outcome.wall_s:.2f} s", "1.00", "yes")
        compared = (
            (each.name, f"{each.wall_s:.2f} s", f"{each.wall_s / outcome.wall_s:.2f}", "yes" if each.same_report else "NO")
            for each in others
        )
        _table("The same work, done another way", ("how", "wall time", "times ours", "same report"), [mine, *compared])
