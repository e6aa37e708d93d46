"""The long form of the outage tests: ``python -m tests.faults.outages flicker|failover|forget``.

``make flicker``, ``make failover`` and ``make forget`` run it.  It prints a line for each run and
ends with an error at the first wrong answer."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell, cell
from tests.faults.refusals import SIZES, Refusing, failed_over, filled, flickered, forgotten


@contextmanager
def refusing_cell() -> Iterator[tuple[Cell, Refusing]]:
    """Run a cell on a server of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "server").mkdir()
        server = embedded.Server(folder / "server", durable=True)
        server.start()
        try:
            with cell(server, "outages", folder, folder / "worker.log") as own:
                yield own, Refusing(server, folder / "server")
        finally:
            server.stop(kill=True)


def flicker(seeds: range, seconds: float) -> None:
    """Refuse writes for moments; then fill the server at each crash point, with each size."""
    for seed in seeds:
        with refusing_cell() as (own, refusing):
            ended = flickered(own, refusing, seconds=seconds, seed=seed)
        print(f"flicker of {seconds:g} s, seed {seed}: {ended} jobs of {ended} right", flush=True)
    for point in CrashPoint:
        for size in SIZES:
            with refusing_cell() as (own, refusing):
                took = filled(own, refusing, point, size)
            print(f"full {point}, {size} bytes: right, {took:.1f} s after room", flush=True)


def failover(runs: range) -> None:
    """Fail over, in turn with connections that are kept and that are reset."""
    for run in runs:
        keeps = run % 2 == 0
        with tempfile.TemporaryDirectory() as folder:
            took = failed_over(Path(folder), keeps=keeps)
        how = "kept" if keeps else "reset"
        print(f"failover {run}, connections {how}: right, progress after {took:.1f} s", flush=True)


def forget(runs: range) -> None:
    """Forget all connections."""
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            took = forgotten(Path(folder))
        print(f"forgotten connections {run}: right, all is well after {took:.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("flicker", "failover", "forget"))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    runs = range(given.first, given.first + given.runs)
    if given.what == "flicker":
        flicker(runs, given.seconds)
    else:
        {"failover": failover, "forget": forget}[given.what](runs)
