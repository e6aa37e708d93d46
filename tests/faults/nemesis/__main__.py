"""Run many histories, on fakeredis and on a real server, and print what they showed.

A history that breaks a promise is run again with fewer faults, and its trace is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.status import Status as Spinner

from rlm_tasks.testing import embedded
from tests.faults.nemesis.histories import Outcome, run_history
from tests.faults.nemesis.servers import RealServer

REAL_SHARE = 0.06
"""This share of the histories has a real server."""
AT_ONCE = 20
"""Histories of one task of the process pool."""
SHRINKING_RUNS = 100


@contextmanager
def real_server() -> Iterator[RealServer]:
    """Run a server with an append-only file for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="rlm-nemesis-") as folder:
        server = embedded.Server(Path(folder), durable=True)
        server.start()
        try:
            yield RealServer(server, Path(folder))
        finally:
            server.stop()


def run_some(seeds: range, real: bool) -> list[Outcome]:
    """Run the histories of some seeds; only those that broke a promise keep their trace."""
    if not real:
        outcomes = [run_history(seed) for seed in seeds]
    else:
        with real_server() as server:
            outcomes = [run_history(seed, real=server) for seed in seeds]
    return [each if each.violations else replace(each, trace=[]) for each in outcomes]


def shrunk(outcome: Outcome) -> Outcome:
    """Return a run of the same seed that still breaks a promise, with as few faults as possible."""
    left_out: frozenset[int] = frozenset()
    for number in range(min(outcome.drawn, SHRINKING_RUNS), 0, -1):
        tried = run_history(outcome.seed, left_out | {number})
        if _kinds(tried) & _kinds(outcome):
            outcome, left_out = tried, left_out | {number}
    return outcome


def _kinds(outcome: Outcome) -> set[str]:
    """Return the violations without their ids and numbers."""
    return {re.sub(r"[0-9a-f]{4,}|[0-9]+", "#", each)[:200] for each in outcome.violations}


def show(outcome: Outcome) -> None:
    """Print the trace and the violations of a history."""
    for at, process, what in outcome.trace:
        print(f"{at:9.3f} s  {process:<14} {what}")
    for violation in outcome.violations:
        print(f"seed {outcome.seed}: {violation}")


def batches(first: int, count: int, real: int) -> Iterator[tuple[range, bool]]:
    """Yield ranges of seeds, and whether they run on a real server: the first `real` do."""
    for lo in range(first, first + count, AT_ONCE):
        yield range(lo, min(lo + AT_ONCE, first + count)), lo - first < real


def main() -> int:
    """Run the histories; return 1 when one broke a promise."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--histories", type=int, default=1000)
    options.add_argument("--seed", type=int, default=1, help="the seed of the first history")
    options.add_argument("--processes", type=int, default=os.cpu_count())
    options.add_argument("--real", type=int, help="number of them that have a real server")
    options.add_argument("--trace", action="store_true", help="run one history, print its trace")
    asked = options.parse_args()
    if asked.trace:
        show(outcome := run_history(asked.seed))
        return bool(outcome.violations)
    began, states, broken = time.monotonic(), Counter[str](), list[Outcome]()
    faults = calls = done = real = 0
    slowest_s = 0.0
    with (
        ProcessPoolExecutor(asked.processes) as pool,
        Console(stderr=True).status("") as spinner,
    ):
        on_real = int(asked.histories * REAL_SHARE) if asked.real is None else asked.real
        work = list(batches(asked.seed, asked.histories, on_real))
        for (seeds, is_real), outcomes in zip(
            work, pool.map(run_some, *zip(*work, strict=True)), strict=True
        ):
            done, real = done + len(seeds), real + len(seeds) * is_real
            for each in outcomes:
                states.update(each.states)
                faults, calls = faults + each.faults, calls + each.calls
                slowest_s = max(slowest_s, each.calm_s)
                broken += [each] if each.violations else []
            seeds_of = ", ".join(str(each.seed) for each in broken) or "none"
            _progress(
                spinner, f"{done} of {asked.histories} histories; broken promises: {seeds_of}"
            )
    for each in broken[:3]:
        show(shrunk(each))
    print(
        f"{done:,} histories, {real:,} of them on a real server, in "
        f"{time.monotonic() - began:,.0f} s: {len(broken)} broke a promise.\n"
        f"{faults:,} faults in {calls:,} calls; jobs: "
        f"{', '.join(f'{count:,} {state}' for state, count in states.most_common())}; "
        f"the slowest ended {slowest_s:.0f} s after the storm"
    )
    print("\n".join(f"seed {each.seed}: {each.violations[0]}" for each in broken))
    return bool(broken)


def _progress(spinner: Spinner, text: str) -> None:
    """Show the progress; without a terminal print a line now and then."""
    spinner.update(text)
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of a history
        os.environ["PYTHONHASHSEED"] = "0"
        command = [sys.executable, "-m", "tests.faults.nemesis", *sys.argv[1:]]
        sys.exit(subprocess.call(command))
    sys.exit(main())
