"""Measure the platform against code that a user would write by hand, and print a table.

`make bench` runs it; begin with `main`.  The runs of both sides alternate and the median counts.
Plain Celery gets the best of several chunk sizes.  Nothing here asserts: a missed figure is printed
as it is.  ``--write`` saves the table in docs/performance.md."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import psutil
import redis
from rich.console import Console
from rich.table import Table

from rlm_tasks import Adaptive, Client
from rlm_tasks.operations.code_metrics import measure_file, python_files, standard_library
from rlm_tasks.testing import embedded, plain_celery
from rlm_tasks.testing.plain_celery import compute
from tests.bench.guards import guards
from tests.bench.plan_and_use import plan_and_use
from tests.bench.preemption import preemption
from tests.integration.conftest import client_of

SLOTS = 2
CHUNKS = (5, 20, 50)
NOTES = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    compared: str
    ratio: str
    figure: str
    met: bool | None


@dataclass
class Bench:
    """The client, server, worker and settings that every measurement uses."""

    client: Client
    server: embedded.Server
    worker: subprocess.Popen[bytes]
    pairs: int
    rounds_per_ms: float


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def calibrated() -> float:
    """Return the number of rounds of `compute` that take a millisecond on this machine."""
    rounds = 200_000
    return rounds / (median(timed(lambda: compute(rounds)) for _ in range(9)) * 1000)


@contextlib.contextmanager
def set_up(pairs: int) -> Iterator[Bench]:
    """Start a server, a worker of the platform and a worker of plain Celery."""
    with embedded.server() as server, tempfile.TemporaryDirectory() as folder:
        environment = {
            "RLM_REDIS_URL": server.url,
            "RLM_OPERATIONS": "tests.bench.ops",
            "PYTHONPATH": str(Path.cwd()),
        }
        plain_celery.app.conf.update(broker_url=server.url, result_backend=server.url)
        logs = Path(folder)
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=logs / "ours.log", slots=SLOTS) as worker,
            embedded.worker(
                environment,
                log=logs / "plain.log",
                app="rlm_tasks.testing.plain_celery",
                slots=SLOTS,
            ),
        ):
            bench = Bench(client, server, worker, pairs, calibrated())
            client.execute(operation="bench_noop", items=range(5000), timeout=60)
            plain_celery.compute_by_chord([1] * 50, 10)
            yield bench


# --- splitting --------------------------------------------------------------------------------


def workloads(bench: Bench) -> Iterator[tuple[str, list[int]]]:
    """Yield lists of item costs, each about 8 s of work on one core."""
    random, n, total_ms = Random(7), 1600, 8000.0
    shapes = {
        "uniform": [1.0] * n,
        "lognormal, sigma 1.5": [random.lognormvariate(0, 1.5) for _ in range(n)],
    }
    shapes["the same, sorted up"] = sorted(shapes["lognormal, sigma 1.5"])
    shapes["the same, sorted down"] = shapes["the same, sorted up"][::-1]
    for name, costs in shapes.items():
        scale = total_ms / sum(costs) * bench.rounds_per_ms
        yield name, [int(cost * scale) for cost in costs]


def splitting(bench: Bench) -> Iterator[Row]:
    """Compare the default adaptive job with a local pool and with hand-tuned chords."""
    with multiprocessing.get_context("fork").Pool(SLOTS) as pool:
        for name, items in workloads(bench):

            def ours(items: list[int] = items) -> object:
                return bench.client.execute(
                    operation="bench_compute", items=items, strategy=Adaptive(), timeout=120
                )

            def local(items: list[int] = items) -> object:
                return pool.map(compute, items, chunksize=1)

            def plain(chunk: int, items: list[int] = items) -> object:
                return plain_celery.compute_by_chord(items, chunk)

            yield from _compared(bench, name, ours, local, plain)
        paths = python_files(standard_library())[::3]

        def ours() -> object:
            return bench.client.execute(
                operation="code_metrics",
                items=paths,
                strategy=Adaptive(),
                continue_on_error=True,
                timeout=120,
            )

        yield from _compared(
            bench,
            f"{len(paths)} real files",
            ours,
            lambda: pool.map(_measured, paths, chunksize=1),
            lambda c: plain_celery.measure_by_chord(paths, c),
        )


def _measured(path: str) -> object:
    with contextlib.suppress(SyntaxError, UnicodeError):
        return measure_file(path)
    return None


def _compared(
    bench: Bench,
    name: str,
    ours: Callable[[], object],
    local: Callable[[], object],
    plain: Callable[[int], object],
) -> Iterator[Row]:
    NOTES.print(f"splitting: {name}")
    ours(), local()
    pairs = [(timed(ours), timed(local)) for _ in range(bench.pairs)]
    by_chunk = {chunk: [] for chunk in CHUNKS}
    for _ in range(max(3, bench.pairs // 2)):
        for chunk, times in by_chunk.items():
            times.append(timed(lambda chunk=chunk: plain(chunk)))
    mine, pool = median(a for a, _ in pairs), median(b for _, b in pairs)
    ratio = median(a / b for a, b in pairs)
    chunk, best = min(
        ((chunk, median(times)) for chunk, times in by_chunk.items()), key=lambda pair: pair[1]
    )
    yield Row(
        f"adaptive, {name}, against Pool(chunksize=1)",
        f"{mine:.2f} s",
        f"{pool:.2f} s",
        f"{ratio:.3f}",
        "<= 1.05",
        ratio <= 1.05,
    )
    yield Row(
        f"adaptive, {name}, against the best chord (chunks of {chunk})",
        f"{mine:.2f} s",
        f"{best:.2f} s",
        f"{mine / best:.3f}",
        "<= 1",
        mine <= best,
    )


# --- small jobs and many leaves ---------------------------------------------------------------


def noop_chord(count: int) -> object:
    """Run a flat chord of no-ops in plain Celery."""
    from celery import chord

    return (
        chord([plain_celery.noop.s(i) for i in range(count)], plain_celery.count.s())
        .apply_async()
        .get(timeout=300)
    )


def small_jobs(bench: Bench) -> Iterator[Row]:
    """Measure no-op jobs, short items, and the million-item sum."""
    NOTES.print("small jobs")
    client = bench.client
    ours = median(
        timed(lambda: client.execute(operation="bench_noop", items=range(1000), timeout=60))
        for _ in range(21)
    )
    plain = median(timed(lambda: noop_chord(1000)) for _ in range(3))
    yield Row(
        "1,000 no-op items, submit to result",
        f"{ours * 1000:.1f} ms",
        f"{plain * 1000:.0f} ms",
        f"{ours / plain:.4f}",
        "<= 30 ms",
        ours <= 0.03,
    )

    items = [int(2 * bench.rounds_per_ms)] * 1000
    ours = median(
        timed(lambda: client.execute(operation="bench_compute", items=items, timeout=60))
        for _ in range(bench.pairs)
    )
    plain = median(
        timed(lambda: plain_celery.compute_by_chord(items, 20)) for _ in range(bench.pairs)
    )
    yield Row(
        "1,000 items of 2 ms on two slots, against chunks of 20",
        f"{ours:.2f} s",
        f"{plain:.2f} s",
        f"{ours / plain:.3f}",
        "<= 1.15 s",
        ours <= 1.15,
    )
    yield from million(bench)


def million(bench: Bench) -> Iterator[Row]:
    """Measure the sum of a million integers: its time, its largest message, and memory."""
    children = psutil.Process(bench.worker.pid).children()
    before = [psutil.Process().memory_info().rss, *(each.memory_info().rss for each in children)]
    with spied(bench.server) as sizes:
        took = median(
            timed(lambda: bench.client.execute(operation="sum", items=range(1_000_000), timeout=60))
            for _ in range(bench.pairs)
        )
    after = [psutil.Process().memory_info().rss, *(each.memory_info().rss for each in children)]
    grown = max(b - a for a, b in zip(before, after, strict=True)) / 2**20
    yield Row("1,000,000-item sum", f"{took:.3f} s", "", "", "<= 0.5 s", took <= 0.5)
    yield Row("its largest message", f"{max(sizes)} B", "", "", "<= 4096 B", max(sizes) <= 4096)
    yield Row(
        "growth of the client or a worker process", f"{grown:.1f} MB", "", "", "< 64 MB", grown < 64
    )


@contextlib.contextmanager
def spied(server: embedded.Server) -> Iterator[list[int]]:
    """Collect the sizes in bytes of all messages that are pushed during a block."""
    sizes: list[int] = []
    over, listening = threading.Event(), threading.Event()

    def watch() -> None:
        with redis.Redis.from_url(server.url).monitor() as monitor:
            listening.set()
            while not over.is_set():
                command = monitor.next_command()["command"]
                if command.startswith("LPUSH"):
                    sizes.append(len(command))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    listening.wait(10)
    yield sizes
    over.set()
    redis.Redis.from_url(server.url).ping()
    watcher.join(10)


def forced_leaves(bench: Bench) -> Iterator[Row]:
    """Measure a thousand leaves of one item each, against a flat chord of a thousand tasks."""
    NOTES.print("forced leaves")

    def ours() -> object:
        return bench.client.execute(
            operation="bench_noop", items=range(1000), type="parallel", chunk_size=1, timeout=120
        )

    ours(), noop_chord(1000)
    pairs = [(timed(ours), timed(lambda: noop_chord(1000))) for _ in range(bench.pairs)]
    ratio = median(a / b for a, b in pairs)
    mine, plain = median(a for a, _ in pairs), median(b for _, b in pairs)
    yield Row(
        "1,000 forced leaves, against a flat chord of 1,000",
        f"{mine:.2f} s",
        f"{plain:.2f} s",
        f"{ratio:.2f}",
        "0.5, at most 0.7",
        ratio <= 0.7,
    )


def cost_growth(bench: Bench, most: int) -> Iterator[Row]:
    """Measure Redis commands and time per leaf, at a thousand leaves and at `most` leaves."""
    NOTES.print(f"cost growth to {most:,} leaves")
    store = bench.client.ledger.store.client

    def per_leaf(leaves: int) -> tuple[float, float]:
        store.config_resetstat()
        took = timed(
            lambda: bench.client.execute(
                operation="bench_noop",
                items=range(leaves),
                type="parallel",
                chunk_size=1,
                timeout=600,
            )
        )
        calls = sum(
            each["calls"]
            for name, each in store.info("commandstats").items()
            if not name.startswith("cmdstat_info")
        )
        return calls / leaves, took / leaves * 1000

    few = [per_leaf(1000) for _ in range(5)]
    commands, ms = median(c for c, _ in few), median(t for _, t in few)
    many_commands, many_ms = per_leaf(most)
    growth, slower = many_commands / commands, many_ms / ms
    yield Row(
        f"Redis commands a leaf, {most:,} leaves against 1,000",
        f"{many_commands:.1f}",
        f"{commands:.1f}",
        f"{growth:.3f}",
        "within 5 %",
        abs(growth - 1) <= 0.05,
    )
    yield Row(
        f"time a leaf, {most:,} leaves against 1,000",
        f"{many_ms:.2f} ms",
        f"{ms:.2f} ms",
        f"{slower:.3f}",
        "within 20 %",
        slower <= 1.2,
    )


# --- submitting and starting ------------------------------------------------------------------


def submitting(bench: Bench) -> Iterator[Row]:
    """Measure how fast batches of a hundred requests become messages."""
    NOTES.print("submitting")
    requests = [{"operation": "sum", "items": range(1)}] * 100
    times, jobs = [], []
    for _ in range(30):
        times.append(timed(lambda: jobs.extend(bench.client.batch_submit(requests))))
    for job in jobs:
        job.wait(60)
    rate, p95 = 100 / median(times), sorted(times)[int(len(times) * 0.95)] * 1000
    yield Row(
        "submitting in batches of 100",
        f"{rate:,.0f} messages/s",
        "",
        "",
        ">= 1,000/s",
        rate >= 1000,
    )
    yield Row("a batch of 100, p95", f"{p95:.1f} ms", "", "", "< 50 ms", p95 < 50)


def starting(bench: Bench) -> Iterator[Row]:
    """Measure the import time of a client, and the time until a worker is ready."""
    NOTES.print("starting")
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def run(code: str) -> float:
        return median(
            timed(lambda: subprocess.run([sys.executable, "-c", code], check=True, env=quiet))
            for _ in range(7)
        )

    bare, ours = run("pass"), run("import rlm_tasks; rlm_tasks.Client")
    took = ours - bare
    yield Row("import rlm_tasks and its Client", f"{took:.2f} s", "", "", "<= 0.5 s", took <= 0.5)
    environment = {"RLM_REDIS_URL": bench.server.url, "RLM_NAMESPACE": "start"}

    def ready() -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            with embedded.worker(environment, log=Path(folder) / "start.log"):
                return time.perf_counter() - began

    took = median(ready() for _ in range(3))
    yield Row("worker ready", f"{took:.2f} s", "", "", "<= 3 s", took <= 3)


# --- the table --------------------------------------------------------------------------------

COLUMNS = ("what", "ours", "compared with", "ratio", "figure", "met")
GROUPS = (
    "splitting",
    "small",
    "leaves",
    "growth",
    "submitting",
    "starting",
    "guards",
    "preemption",
    "plan",
)


def show(rows: list[Row]) -> None:
    """Print the table to the terminal."""
    table = Table(title="Measured, medians", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row.what,
            row.ours,
            row.compared,
            row.ratio,
            row.figure,
            {True: "yes", False: "NO", None: ""}[row.met],
        )
    Console(width=140).print(table)


def markdown(rows: list[Row], pairs: int) -> str:
    """Return the table for docs/performance.md."""
    lines = [
        f"Measured with `make bench` on {os.cpu_count()} cores, Python {platform.python_version()},"
        f" medians of {pairs} alternating pairs.",
        "",
    ]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    met = {True: "yes", False: "**no**", None: ""}
    lines += [
        f"| {r.what} | {r.ours} | {r.compared} | {r.ratio} | {r.figure} | {met[r.met]} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the groups of measurements that the command line names, and print the table."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=", description=__doc__)
    parser.add_argument(
        "groups", nargs="*", default=list(GROUPS), help=f"any of {', '.join(GROUPS)}; default: all"
    )
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs per row")
    parser.add_argument("--most", type=int, default=50_000, help="leaves of the cost growth row")
    parser.add_argument(
        "--write", action="store_true", help="save the table in docs/performance.md"
    )
    asked = parser.parse_args()
    embedded.clean_up_on_sigterm()
    rows: list[Row] = []
    with set_up(asked.pairs) as bench:
        runs: dict[str, Callable[[], Iterator[Row]]] = {
            "splitting": lambda: splitting(bench),
            "small": lambda: small_jobs(bench),
            "leaves": lambda: forced_leaves(bench),
            "growth": lambda: cost_growth(bench, asked.most),
            "submitting": lambda: submitting(bench),
            "starting": lambda: starting(bench),
            "guards": lambda: (Row(*each) for each in guards(bench.pairs)),
            "preemption": lambda: (Row(*each) for each in preemption()),
            "plan": lambda: (Row(*each) for each in plan_and_use()),
        }
        for group in asked.groups:
            for row in runs[group]():
                NOTES.print(f"  {row.what}: {row.ours} {row.compared} {row.ratio}")
                rows.append(row)
    show(rows)
    if asked.write:
        page = Path("docs/performance.md")
        head, mark, _ = page.read_text(encoding="utf-8").partition("<!-- measured -->\n")
        page.write_text(head + mark + "\n" + markdown(rows, asked.pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
