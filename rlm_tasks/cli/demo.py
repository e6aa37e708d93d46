"""Commands to try the platform: `serve` starts a Redis server, `demo` runs a real job.

See `testing.demo` and `testing.embedded` for the work behind them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.output import as_json_option, print_json, say, table

if TYPE_CHECKING:
    from rich.console import Console

    from rlm_tasks.results import Progress
    from rlm_tasks.testing.demo import Compared, Outcome


@click.command()
@click.option(
    "--path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of Python files; default: the standard library.",
)
@click.option(
    "--slots",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Pool processes of the demo's worker.",
)
@click.option("--compare", is_flag=True, help="Also run it serially and with a plain Celery chord.")
@as_json_option
def demo(path: Path | None, slots: int, compare: bool, as_json: bool) -> None:
    """Measure a folder of Python files, with a worker that the demo starts."""
    from rich.console import Console

    from rlm_tasks.operations.code_metrics import standard_library
    from rlm_tasks.testing import demo as main_job
    from rlm_tasks.testing import embedded

    embedded.clean_up_on_sigterm()

    notes = Console(stderr=True)
    folder = path or standard_library()
    with notes.status("starting a server and a worker"):
        platform = main_job.platform(slots)
        client, environment, logs = platform.__enter__()
    try:
        with _progress_bar(notes) as show:
            outcome, paths = main_job.run(client, folder, slots, show)
        others = []
        if compare:
            with notes.status("comparing"):
                others = list(main_job.compare(environment, logs, outcome, paths))
    finally:
        platform.__exit__(*sys.exc_info())
    if as_json:
        print_json({**outcome.to_dict(), "compared": [_row(each) for each in others]})
        return
    _show_report(outcome)
    _show_run(outcome, others)


@contextmanager
def _progress_bar(notes: Console) -> Iterator[Callable[[Progress], None]]:
    """Show a bar for the length of a block, and yield the function that moves it."""
    from rich import progress as bars

    from rlm_tasks.words import count

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("files"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=notes) as bar:
        line = bar.add_task("measuring", total=None)

        def show(progress: Progress) -> None:
            bar.update(
                line,
                total=progress.total,
                completed=progress.done + progress.failed + progress.skipped,
                description=f"{count(progress.nodes, 'node')}, {count(progress.splits, 'split')}",
            )

        yield show


def _row(each: Compared) -> dict[str, Any]:
    return {"name": each.name, "wall_s": each.wall_s, "same_report": each.same_report}


def _show_report(outcome: Outcome) -> None:
    from rlm_tasks.words import count

    report, folder = outcome.result.output, Path(outcome.folder)
    deepest, where = report["deepest"]
    names = ("files", "lines", "functions", "classes", "branches")
    say(f"Python files below {folder}")
    table("", ("what", "count"), [(name, report[name]) for name in names])
    say(f"Deepest nesting: {count(deepest, 'level')}, in {_short(where, folder)}\n")
    rows = (
        (branches, name, f"{_short(path, folder)}:{line}")
        for branches, path, line, name in report["complex"]
    )
    table("The ten most complex functions", ("branches + 1", "function", "where"), rows)
    if outcome.result.failed_count:
        say(f"{count(outcome.result.failed_count, 'file')} could not be parsed:")
        for failure in outcome.result.failed[:5]:
            message = failure.message.replace(str(folder), "...")
            say(f"  item {failure.index}: {failure.type}: {message}")
        say("  ..." if outcome.result.failed_count > 5 else "")


def _short(path: str, folder: Path) -> str:
    return str(Path(path).relative_to(folder)) if path else "-"


def _show_run(outcome: Outcome, others: list[Compared]) -> None:
    from rlm_tasks.words import count

    metrics = outcome.result.metrics
    rows: list[tuple[str, Any]] = [
        ("wall time", f"{outcome.wall_s:.2f} s on {count(outcome.slots, 'slot')}"),
        ("nodes", metrics.nodes),
        ("splits", metrics.splits),
        ("tail calls", metrics.yields),
        ("depth of the tree", metrics.max_depth),
        ("slots' busy share", f"{outcome.busy_share:.0%}"),
        ("speed-up", f"{outcome.speed_up:.2f}, the summed time of items over wall time"),
        ("largest process", f"{metrics.peak_memory_mb:.0f} MB"),
        ("left out", str(outcome.result.receipt)),
    ]
    table("How it ran", ("what", "figure"), rows)
    if others:
        say("")
        ours = (f"{outcome.wall_s:.2f} s", "1.00", "yes", "RLM Tasks, without a chunk size")
        compared = (
            (
                f"{each.wall_s:.2f} s",
                f"{each.wall_s / outcome.wall_s:.2f}",
                "yes" if each.same_report else "NO",
                each.name,
            )
            for each in others
        )
        table(
            "The same work in other ways",
            ("wall time", "times ours", "same report", "how"),
            [ours, *compared],
            minor=("times ours", "same report"),
        )


@click.command()
@click.option(
    "--port",
    default=6379,
    show_default=True,
    type=click.IntRange(1, 65_535),
    help="Port on the loopback interface.",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for its data; default: data are not kept.",
)
def serve(port: int, folder: Path | None) -> None:
    """Run a Redis or Valkey server, or else the embedded one, until Ctrl-C.

    It is for trials, not for production.
    """
    import tempfile

    from rlm_tasks.testing import embedded

    embedded.clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="rlm-") as temporary:
        data = folder or Path(temporary)
        data.mkdir(parents=True, exist_ok=True)
        server = embedded.Server(data, durable=folder is not None, port=port)
        try:
            server.start()
            say(f"{server.url} answers; Ctrl-C ends it.")
            server.wait()
        except KeyboardInterrupt:
            say("Stopped.")
        finally:
            server.stop()


COMMANDS = (demo, serve)
