"""Calls to models through the whole platform, against a provider that enforces true sliding windows
and counts every token.

``python -m tests.faults.llm`` lets two workers of four processes go against the fake provider: a
window of 10 s stands for a minute.  It prints how much of the limits was used, whether answers were
exact after faults and kills, whether budgets held, and how work beside it fared; it exits with 1
when a promise is broken."""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from rlm_tasks import Client, Job, JobResult
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

WINDOWS, WINDOW_S = 30, 10.0
WORKERS, SLOTS = 2, 4
LATENCY_S = 0.05
"""What a provider takes to answer: 0.3 s where a window is a minute."""
LEAST_USE, MOST_HINDRANCE = 0.97, 1.1
SCALES = (0.25, 1.0)
"""Work beside calls is looked at where the machine is hardly busy, and where the calls keep it half
busy.
"""
UNLIMITED = 1e9
LIMITS = {
    "tokens": {"requests": UNLIMITED, "tokens": 700.0},
    "requests": {"requests": 45.0, "tokens": UNLIMITED},
    "": {"requests": UNLIMITED, "tokens": UNLIMITED},
}
"""The limit that binds -> limits for each second: forty to fifty calls, of which two cores bear
more.
"""
FAULTS = ("429", "slow", "500", "garbage", "cut", "empty", "timeout")
ATTEMPTS = 8
"""So often an item is tried, that none fails for good by chance: more than one call in ten goes
wrong.
"""
TIMEOUT_S = 1.0
LATE = [{"kind": "slow", "every": 5, "seconds": TIMEOUT_S}]
"""Answers that are given, and counted, when nobody waits for them any more."""


# --- the stage --------------------------------------------------------------------------------


@dataclass
class Stage:
    """A provider, and workers that are killed and started again."""

    provider: fake_provider.Running
    client: Client
    start: Callable[[int], subprocess.Popen[bytes]]
    workers: list[subprocess.Popen[bytes]]
    slots: int
    binds: str  # the limit that is met first, '' when none is
    limit: float  # in any window
    window_s: float

    def warm_up(self) -> None:
        """Let every process make a call, then begin anew: what it has to import takes seconds, in
        which a window is over.
        """
        processes = len(self.workers) * self.slots
        while self.provider.report()["connections"] < processes:
            # A node of one item has one connection of its own process, which is kept.
            self.map(
                range(2 * processes), priority="critical", type="parallel", chunk_size=1
            ).result(timeout=60)
        self.reset()

    def reset(self, *schedule: Mapping[str, Any]) -> None:
        """Begin anew: nothing is counted, and calls go wrong by a schedule from now on."""
        self.provider.reset()
        self.provider.schedule(*schedule)

    def map(self, numbers: Sequence[int], **more: Any) -> Job:
        """Open a job that asks for the sum of a number and its double, for each."""
        items = [f"{number} {2 * number}" for number in numbers]
        return self.client.submit(operation="llm.map", items=items, params=ASKED, **more)

    def kill_process(self) -> None:
        """End a pool process as the kernel ends what is out of memory: the one that has worked
        most.
        """
        children = [
            each for worker in self.workers for each in psutil.Process(worker.pid).children()
        ]
        with suppress(psutil.NoSuchProcess):
            max(children, key=lambda each: each.cpu_times().user).kill()

    def kill_worker(self) -> None:
        """Lose a whole machine, and start another."""
        os.killpg(self.workers[0].pid, signal.SIGKILL)
        self.workers[0].wait()
        self.workers[0] = self.start(0)


ASKED = {"prompt": "What is the sum of these two? SUM: {item}", "max_tokens": 4}
"""What every item is asked: a prompt of 11 to 13 tokens, an answer of one or two."""
PAID_TOKENS = 13.5
"""... and so many of both, on average."""


@contextmanager
def stage(
    binds: str = "",
    window_s: float = WINDOW_S,
    *,
    scale: float = 1.0,
    guard_s: float = 0.0,
    slots: int = SLOTS,
    workers: int = WORKERS,
    **more: str,
) -> Iterator[Stage]:
    """Run a provider with a limit, and workers that know it, for the length of a block; every
    process is warm when it begins.

    The limit is that of LIMITS, scaled.  Workers count windows `guard_s` longer than the provider:
    for requests that a busy machine delays on their way."""
    limits: dict[str, float] = {
        name: round(rate * scale * window_s) for name, rate in LIMITS[binds].items()
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm-llm-")))
        server = stack.enter_context(embedded.server())
        provider = stack.enter_context(
            fake_provider.running((), **limits, window=window_s, latency=LATENCY_S)
        )
        told = {f"RLM_LLM__{name.upper()}": str(limit) for name, limit in limits.items()}
        usual = {
            "RLM_LLM__WINDOW_S": str(window_s + guard_s),
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_API_KEY": "any",
            "RLM_LLM__TIMEOUT_S": str(TIMEOUT_S),
            "RLM_LLM__ATTEMPTS": str(ATTEMPTS),
            "RLM_LEDGER__LEASE_S": "2",
            "RLM_LEDGER__SWEEP_S": "0.5",
        }
        environment = {**environment_of(server.url, "llm"), **told, **usual, **more}

        def start(number: int) -> subprocess.Popen[bytes]:
            log, name = folder / f"w{number}.log", f"w{number}@llm"
            return stack.enter_context(
                embedded.worker(environment, log=log, slots=slots, options=["-n", name])
            )

        client = stack.enter_context(client_of(environment))
        found = Stage(
            provider,
            client,
            start,
            [start(number) for number in range(workers)],
            slots,
            binds,
            limits.get(binds, UNLIMITED),
            window_s,
        )
        found.warm_up()
        yield found


# --- a. the limits are used up, and never exceeded --------------------------------------------


@dataclass(frozen=True)
class Use:
    """What became of a limit; shares are 1.0 when all of it was used."""

    binds: str
    window_s: float
    calls: int
    early: int  # 429 in the first window
    refused: int  # ... and after it
    shares: list[float]  # used in each window after the first

    @property
    def used(self) -> float:
        """Share used, over all windows after the first."""
        return statistics.fmean(self.shares)

    @property
    def row(self) -> dict[str, str]:
        """What is shown of it."""
        return {
            "binds": self.binds,
            "window": f"{self.window_s:g} s",
            "calls": f"{self.calls:,}",
            "429 at first": str(self.early),
            "429": str(self.refused),
            "used": f"{self.used:.2%}",
            "least": f"{min(self.shares):.2%}",
        }

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.refused and self.used >= LEAST_USE


def against_limits(on: Stage, windows: int, *, priority: str = "normal") -> Use:
    """Let a job call as often as it may, for some windows, and return what the provider has
    seen.
    """
    on.reset()
    job = on.map(range(int(60 * windows * on.window_s)), priority=priority)
    wait_until(lambda: bool(on.provider.report()["taken"]))
    began = on.provider.report()["taken"][0][0]
    early = _report_at(on, began + on.window_s)["refused"]
    seen = _report_at(on, began + windows * on.window_s)
    job.cancel()
    job.wait(20)
    used: Counter[int] = Counter()
    for at, tokens in seen["taken"]:
        used[int((at - began) / on.window_s)] += tokens if on.binds == "tokens" else 1
    shares = [used[number] / on.limit for number in range(1, windows)]
    return Use(on.binds, on.window_s, len(seen["taken"]), early, seen["refused"] - early, shares)


def _report_at(on: Stage, moment: float) -> dict[str, Any]:
    time.sleep(max(0.0, moment - time.monotonic()))  # all processes of a machine share this clock
    return on.provider.report()


# --- b. answers are exact, whatever goes wrong ------------------------------------------------


def schedule(every: int) -> list[dict[str, Any]]:
    """Return what goes wrong: each kind of fault a little less often than the one before, the first
    with every so many calls.
    """
    about = {"seconds": 0.2, "headers": {"retry-after-ms": "100"}}
    return [
        {"kind": kind, "every": every + 3 * number, **about} for number, kind in enumerate(FAULTS)
    ]


@dataclass(frozen=True)
class Answers:
    """What became of the items of a job while calls failed and processes were killed."""

    operation: str
    items: int
    wrong: int  # wrong answers, or missing ones
    failed: int
    faults: dict[str, int]  # of the provider, by kind
    kills: int
    again: int  # answers that were given more than once: paid for, and lost
    seconds: float
    slowest_s: float  # longest time without a new answer

    @property
    def row(self) -> dict[str, str]:
        """What is shown of it."""
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return {
            "operation": self.operation,
            "items": f"{self.items:,}",
            "wrong": str(self.wrong),
            "failed": str(self.failed),
            "faults": faults,
            "kills": str(self.kills),
            "paid again": str(self.again),
            "took": f"{self.seconds:.1f} s",
            "longest pause": f"{self.slowest_s:.1f} s",
        }

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not (self.wrong or self.failed)


def through_faults(
    on: Stage, operation: str, items: int, kills: Mapping[float, str], every: int = 45
) -> Answers:
    """Run a job while calls fail by a schedule, and processes die when a share of the items is
    done.
    """
    on.reset(*schedule(every))
    numbers, began = range(1000, 1000 + items), time.monotonic()
    merges = {} if operation == "llm.map" else {"fan_in": FAN_IN, "max_tokens": 2 * items}
    job = on.client.submit(
        operation=operation,
        items=[f"{number} {2 * number}" for number in numbers],
        params={**ASKED, **merges},
        continue_on_error=True,
    )
    slowest_s = _kill_on_the_way(on, job, kills)
    result, seen = job.result(timeout=120), on.provider.report()
    texts = [str(3 * numbers[index]) for index in result.successful]
    right, got = (
        (texts, result.output) if operation == "llm.map" else ([merged(texts)], [result.output])
    )
    wrong = sum(one != other for one, other in zip(right, got, strict=False)) + abs(
        len(right) - len(got)
    )
    wrong += items - len(texts) - result.failed_count  # what is neither done nor failed is lost
    again = seen["answered"] - seen["prompts"]["distinct"]
    took_s = time.monotonic() - began
    return Answers(
        operation,
        items,
        wrong,
        result.failed_count,
        seen["faults"],
        len(kills),
        again,
        took_s,
        slowest_s,
    )


FAN_IN = 4


def merged(texts: list[str]) -> str:
    """Return what the fake model makes of texts, merged in groups until one is left."""
    while len(texts) > 1:
        groups = [texts[at : at + FAN_IN] for at in range(0, len(texts), FAN_IN)]
        texts = ["; ".join(sorted(set(group))) for group in groups]
    return texts[0]


def _kill_on_the_way(on: Stage, job: Job, kills: Mapping[float, str]) -> float:
    """Kill what is to die at some shares of the items; return the longest time in seconds without a
    new answer.
    """
    left, done, since, slowest_s = dict(sorted(kills.items())), 0, time.monotonic(), 0.0
    for progress in job.watch(0.05):
        if progress.done > done:
            slowest_s, done, since = (
                max(slowest_s, time.monotonic() - since),
                progress.done,
                time.monotonic(),
            )
        if left and progress.fraction >= next(iter(left)):
            what = left.pop(next(iter(left)))
            on.kill_worker() if what == "worker" else on.kill_process()
    return max(slowest_s, time.monotonic() - since)


# --- c. budgets hold --------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """What became of a budget that could not suffice."""

    unit: str
    budget: float
    counted: float  # by the provider
    told: float  # by the job
    one_call: float  # what one call may cost at most
    stopped: str
    done: int
    merged: bool  # the answer holds what every item that was done has answered, and nothing else
    kills: int
    seconds: float

    @property
    def row(self) -> dict[str, str]:
        """What is shown of it."""
        return {
            "budget": f"{self.budget:g} {self.unit}",
            "counted": f"{self.counted:g}",
            "told": f"{self.told:g}",
            "used": f"{self.counted / self.budget:.1%}",
            "stopped": self.stopped,
            "done": str(self.done),
            "merged": str(self.merged),
            "kills": str(self.kills),
            "took": f"{self.seconds:.1f} s",
        }

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        held = self.counted <= self.budget + self.one_call and self.told >= self.counted
        return held and self.stopped == "budget" and self.merged


def on_a_budget(
    on: Stage, unit: str, budget: float, kills: Sequence[float] = (), *, late: bool = False
) -> Spent:
    """Let 16 nodes spend a budget at once, and kill processes when some shares of it are spent.

    Where answers are `late`, many are given when nobody waits for them any more.
    """
    on.reset(*LATE if late else ())
    items, began = round(2 * budget / (1 if unit == "calls" else PROMPT_TOKENS)), time.monotonic()
    asked, right = _long(items) if late else _alike(items)
    job = on.client.submit(
        **asked, type="parallel", chunk_size=-(-items // 16), budget={unit: budget}
    )
    left = sorted(kills)
    for _ in job.watch(0.02):
        spent = job.spent()
        if left and spent and spent.spent[unit] + spent.held[unit] >= budget * left[0]:
            left.pop(0)
            on.kill_process()
    result, seen = job.result(timeout=150), on.provider.report()
    told, counted = (
        result.spent,
        seen["answered"] if unit == "calls" else seen["prompt_tokens"] + seen["completion_tokens"],
    )
    one_call = 1 if unit == "calls" else PROMPT_TOKENS + MOST_TOKENS
    return Spent(
        f"{unit}, late" if late else unit,
        budget,
        counted,
        told.spent[unit] if told else 0.0,
        one_call,
        result.stopped,
        result.done,
        right(result),
        len(kills) - len(left),
        time.monotonic() - began,
    )


PROMPT_TOKENS, MOST_TOKENS = 30, 30
KINDS = 8
"""So many different answers there are: merged, they are no longer than an answer may be."""
Right = Callable[[JobResult], bool]


def _alike(items: int) -> tuple[dict[str, Any], Right]:
    """Return a job of few different answers, which are merged, and what tells whether it has merged
    what was done.
    """
    texts = [f"{number % KINDS} {number} -{number}" for number in range(items)]
    asked = {
        "operation": "llm.map_reduce",
        "params": {**ASKED, "max_tokens": MOST_TOKENS, "fan_in": 50},
        "items": texts,
    }
    return (
        asked,
        lambda it: (
            set(re.split("; |\n\n", it.output)) == {str(index % KINDS) for index in it.successful}
        ),
    )


def _long(items: int) -> tuple[dict[str, Any], Right]:
    """Return a job whose answers are as long as its prompts, and what tells whether it has what was
    done.
    """
    texts = [f"{number} of a number of considerations" for number in range(items)]
    asked = {
        "operation": "llm.map",
        "params": {"prompt": "{item}", "max_tokens": MOST_TOKENS},
        "items": texts,
    }
    return asked, lambda it: it.output == [texts[index] for index in it.successful]


# --- d. work beside it is not hindered --------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """How long jobs without limits waited to be started, in ms."""

    rate: float  # calls in a second
    alone: list[float]
    by_hand: list[float]  # beside a script that makes such calls, for which no worker does anything
    beside: list[float]  # beside a job that makes them, and waits for its limits
    nodes: int  # that job's, which run or wait at the end

    @property
    def hindrance(self) -> float:
        """By how much the 95th percentile is longer beside the other job."""
        return p95(self.beside) / p95(self.alone)

    @property
    def row(self) -> dict[str, str]:
        """What is shown of it."""
        lists = {"alone": self.alone, "by hand": self.by_hand, "beside": self.beside}
        return {
            "calls": f"{self.rate:.0f}/s",
            "jobs": str(len(self.beside)),
            **{f"median {name}": _ms(statistics.median(waits)) for name, waits in lists.items()},
            **{f"p95 {name}": _ms(p95(waits)) for name, waits in lists.items()},
            "x": f"{self.hindrance:.2f}",
            "nodes": f"{self.nodes:,}",
        }

    @property
    def kept(self) -> bool:
        """Whether every promise was kept; waits are told in whole milliseconds, and last a few."""
        return self.hindrance <= MOST_HINDRANCE


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(values, n=20)[-1]


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def beside_others(on: Stage, rounds: int, jobs: int, every_s: float = 0.05) -> Beside:
    """Start small jobs one after the other, in turns alone, beside a job that waits for its limits,
    and beside its calls alone.
    """
    rate, most = on.limit / on.window_s / PAID_TOKENS, 0
    alone, beside, by_hand = list[float](), list[float](), list[float]()

    def start_small_ones(waits: list[float]) -> None:
        for _ in range(jobs):
            small = on.client.submit(operation="sum", items=range(10))
            waits.append(small.result(timeout=20).metrics.waited_ms)
            time.sleep(every_s)  # the rate of the jobs

    for _ in range(rounds):
        start_small_ones(alone)
        on.reset()
        with limited_job(on) as limited:
            start_small_ones(beside)
            most = max(most, limited.progress().pending)
        on.reset()
        with calls_by_hand(on, 0.9 * rate):  # or some would be refused
            start_small_ones(by_hand)
    return Beside(rate, alone, by_hand, beside, most)


@contextmanager
def limited_job(on: Stage) -> Iterator[Job]:
    """Run a job for the length of a block that waits for its limits, and has used them up once: its
    first nodes are sent at once.
    """
    job = on.map(range(100_000))
    wait_until(lambda: "no room" in job.explain())
    wait_until(lambda: sum(tokens for _, tokens in on.provider.report()["taken"]) >= on.limit)
    try:
        yield job
    finally:
        job.cancel()
        job.wait(20)


@contextmanager
def calls_by_hand(on: Stage, rate: float) -> Iterator[None]:
    """Make so many calls in a second for the length of a block, by a process that knows nothing of
    the platform.
    """
    command = [sys.executable, "-m", "tests.faults.by_hand", on.provider.base_url, str(rate)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: bool(on.provider.report()["taken"]))
        yield
    finally:
        process.kill()
        process.wait()


# --- all of it --------------------------------------------------------------------------------


Found = Use | Answers | Spent | Beside


def show(*found: Found) -> None:
    """Print what became of the promises, a table for each kind."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for kind in dict.fromkeys(map(type, found)):
        rows = [each.row for each in found if type(each) is kind]
        table = Table(*rows[0], "kept", title=kind.__name__.lower(), title_justify="left")
        for row, kept in zip(
            rows, (each.kept for each in found if type(each) is kind), strict=True
        ):
            table.add_row(*row.values(), "yes" if kept else "[bold]no")
        console.print(table)


KILLS = {0.15: "process", 0.3: "process", 0.45: "worker", 0.7: "process"}


def main() -> int:
    """Run all parts, or those that are asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--windows", type=int, default=WINDOWS)
    options.add_argument(
        "--window", type=float, default=WINDOW_S, help="seconds that stand for a minute"
    )
    options.add_argument(
        "--guard", type=float, default=0.0, help="seconds that workers count a window longer"
    )
    options.add_argument("--priority", default="normal", help="of the job that uses the limits up")
    options.add_argument(
        "--part",
        choices=["use", "answers", "budgets", "beside"],
        action="append",
        help="all when left out",
    )
    options.add_argument(
        "--binds", choices=["tokens", "requests"], action="append", help="both when left out"
    )
    asked = options.parse_args()
    embedded.clean_up_on_sigterm()
    parts, found = asked.part or ["use", "answers", "budgets", "beside"], list[Found]()
    for binds in (asked.binds or ["tokens", "requests"]) if "use" in parts else ():
        with stage(binds, asked.window, guard_s=asked.guard) as on:
            found.append(against_limits(on, asked.windows, priority=asked.priority))
    if "answers" in parts:
        with stage("requests") as on:
            found += [
                through_faults(on, "llm.map", 1000, KILLS),
                through_faults(on, "llm.map_reduce", 200, KILLS),
            ]
    if "budgets" in parts:
        with stage(slots=8) as on:
            found += [
                on_a_budget(on, unit, budget, (0.3, 0.6))
                for unit, budget in (("tokens", 6000.0), ("calls", 400.0))
            ]
            found.append(on_a_budget(on, "tokens", 2000.0, late=True))
    if "beside" in parts:
        for scale in SCALES:
            with stage("tokens", asked.window, scale=scale) as on:
                found.append(beside_others(on, 4, 60))
    show(*found)
    return 0 if all(each.kept for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
