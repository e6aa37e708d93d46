"""Calls to models through the whole platform, against a provider that enforces true sliding windows and counts every token.

``python -m tests.faults.llm`` lets two workers of four processes go against the fake provider: a window of 2 s stands for
a minute.  It prints how much of the limits was used, whether answers were exact after faults and kills, whether budgets
held, and how work beside it fared; it exits with 1 when a promise is broken.
"""

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
from random import Random
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from rlm_tasks import Client, Job, embedded
from rlm_tasks.llm import fake
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

WINDOWS, WINDOW_S = 30, 2.0
WORKERS, SLOTS = 2, 4
LATENCY_S = 0.05
"""What a provider takes to answer, about: 1.5 s where a window is a minute."""
LEAST_USE, MOST_HINDRANCE = 0.97, 1.1
UNLIMITED = 1e9
LIMITS = {"tokens": {"requests": UNLIMITED, "tokens": 700.0}, "requests": {"requests": 45.0, "tokens": UNLIMITED}}
"""The limit that binds -> limits for each second: forty to fifty calls, of which two cores bear more."""
SCHEDULE = [
    {"kind": kind, "every": every, "seconds": 0.2, "headers": {"retry-after-ms": "100"}}
    for kind, every in {"429": 47, "500": 53, "timeout": 97, "garbage": 59, "cut": 61, "empty": 67, "slow": 43}.items()
]
ATTEMPTS = 8
"""So often an item is tried, that none fails for good by chance: more than one call in ten goes wrong."""
TIMEOUT_S = 1.0


# --- the stage ---------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A provider, and workers that are killed and started again."""

    provider: fake.Running
    client: Client
    start: Callable[[int], subprocess.Popen[bytes]]
    workers: list[subprocess.Popen[bytes]]
    slots: int
    window_s: float

    def warm_up(self) -> None:
        """Let every process make a call, then begin anew: what it has to import takes seconds, in which a window is over."""
        processes = len(self.workers) * self.slots
        while self.provider.report()["connections"] < processes:
            # A node of one item has one connection of its own process, which is kept.
            self.map(range(2 * processes), priority="critical", type="parallel", chunk_size=1).result(timeout=60)
        time.sleep(self.window_s)  # what was taken leaves the shared window, as it leaves the provider's
        self.provider.reset()

    def map(self, numbers: Sequence[int], **more: Any) -> Job:
        """Open a job that asks for the sum of a number and its double, for each."""
        items = [f"{number} {2 * number}" for number in numbers]
        return self.client.submit(operation="llm.map", items=items, params=ASKED, **more)

    def kill_process(self, random: Random) -> None:
        """End one pool process as the kernel ends what is out of memory."""
        children = [each for worker in self.workers for each in psutil.Process(worker.pid).children()]
        with suppress(psutil.NoSuchProcess):
            random.choice(children).kill()

    def kill_worker(self) -> None:
        """Lose a whole machine, and start another."""
        os.killpg(self.workers[0].pid, signal.SIGKILL)
        self.workers[0].wait()
        self.workers[0] = self.start(0)


ASKED = {"prompt": "What is the sum of these two? SUM: {item}", "max_tokens": 4}
"""What every item is asked: a prompt of 11 to 13 tokens, an answer of one or two."""


@contextmanager
def stage(
    window_s: float, requests: float, tokens: float, *, slots: int = SLOTS, workers: int = WORKERS, **more: str
) -> Iterator[Stage]:
    """Run a provider with limits for each second, and workers that know them, for the length of a block."""
    limits = {"window": window_s, "requests": round(requests * window_s), "tokens": round(tokens * window_s)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm-llm-")))
        server = stack.enter_context(embedded.server())
        provider = stack.enter_context(fake.running(**limits, latency=LATENCY_S))
        told = {f"RLM_LLM__{'WINDOW_S' if name == 'window' else name.upper()}": str(limit) for name, limit in limits.items()}
        usual = {
            "OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "any", "RLM_LLM__TIMEOUT_S": str(TIMEOUT_S),
            "RLM_LLM__ATTEMPTS": str(ATTEMPTS), "RLM_LEDGER__LEASE_S": "2", "RLM_LEDGER__SWEEP_S": "0.5",
        }  # fmt: skip
        environment = environment_of(server.url, "llm", **{**told, **usual, **more})

        def start(number: int) -> subprocess.Popen[bytes]:
            log, name = folder / f"w{number}.log", f"w{number}@llm"
            return stack.enter_context(embedded.worker(environment, log=log, slots=slots, options=["-n", name]))

        client = stack.enter_context(client_of(environment))
        yield Stage(provider, client, start, [start(number) for number in range(workers)], slots, window_s)


# --- a. the limits are used up, and never exceeded ------------------------------------------------------


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
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.refused and self.used >= LEAST_USE


def against_limits(binds: str, windows: int, window_s: float, *, priority: str = "normal", **more: Any) -> Use:
    """Let a job call as often as it may, for some windows, and return what the provider has seen."""
    limits = LIMITS[binds]
    with stage(window_s, **limits, **more) as on:
        on.warm_up()
        job = on.map(range(int(60 * windows * window_s)), priority=priority)
        wait_until(lambda: bool(on.provider.report()["taken"]))
        began = on.provider.report()["taken"][0][0]
        early = _report_at(on, began + window_s)["refused"]
        seen = _report_at(on, began + windows * window_s)
        job.cancel()
    used: Counter[int] = Counter()
    for at, tokens in seen["taken"]:
        used[int((at - began) / window_s)] += tokens if binds == "tokens" else 1
    shares = [used[number] / round(limits[binds] * window_s) for number in range(1, windows)]
    return Use(binds, window_s, len(seen["taken"]), early, seen["refused"] - early, shares)


def _report_at(on: Stage, moment: float) -> dict[str, Any]:
    time.sleep(max(0.0, moment - time.monotonic()))  # all processes of a machine share this clock
    return on.provider.report()


# --- b. answers are exact, whatever goes wrong -----------------------------------------------------------


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
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not (self.wrong or self.failed)


def through_faults(operation: str, items: int, kills: Mapping[float, str], **more: Any) -> Answers:
    """Run a job while calls fail by a schedule, and processes die when a share of the items is done."""
    with stage(WINDOW_S, 60.0, UNLIMITED, **more) as on:
        on.warm_up()
        on.provider.schedule(*SCHEDULE)
        numbers, began, random = list(range(1000, 1000 + items)), time.monotonic(), Random(1)
        merges = {} if operation == "llm.map" else {"fan_in": FAN_IN, "max_tokens": 4 * items}
        asked = [f"{number} {2 * number}" for number in numbers]
        job = on.client.submit(operation=operation, items=asked, params={**ASKED, **merges}, continue_on_error=True)
        slowest_s = _kill_on_the_way(on, job, kills, random)
        result, seen = job.result(timeout=120), on.provider.report()
        took_s = time.monotonic() - began
    texts = [str(3 * numbers[index]) for index in result.successful]
    right, got = (texts, result.output) if operation == "llm.map" else ([merged(texts)], [result.output])
    wrong = sum(one != other for one, other in zip(right, got, strict=False)) + abs(len(right) - len(got))
    again = seen["answered"] - seen["prompts"]["distinct"]
    return Answers(operation, items, wrong, result.failed_count, seen["faults"], len(kills), again, took_s, slowest_s)


FAN_IN = 4


def merged(texts: list[str]) -> str:
    """Return what the fake model makes of texts, merged in groups until one is left."""
    while len(texts) > 1:
        groups = [texts[at : at + FAN_IN] for at in range(0, len(texts), FAN_IN)]
        texts = ["; ".join(sorted(set(group))) for group in groups]
    return texts[0]


def _kill_on_the_way(on: Stage, job: Job, kills: Mapping[float, str], random: Random) -> float:
    """Kill what is to die at some shares of the items; return the longest time in seconds without a new answer."""
    left, done, since, slowest_s = dict(sorted(kills.items())), 0, time.monotonic(), 0.0
    for progress in job.watch(0.05):
        if progress.done > done:
            slowest_s, done, since = max(slowest_s, time.monotonic() - since), progress.done, time.monotonic()
        if left and progress.fraction >= next(iter(left)):
            what = left.pop(next(iter(left)))
            on.kill_worker() if what == "worker" else on.kill_process(random)
    return max(slowest_s, time.monotonic() - since)


# --- c. budgets hold -----------------------------------------------------------------------------------


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
    def kept(self) -> bool:
        """Whether every promise was kept."""
        held = self.counted <= self.budget + self.one_call and self.told >= self.counted
        return held and self.stopped == "budget" and self.merged


def on_a_budget(
    unit: str,
    budget: float,
    kills: Mapping[float, str],
    *,
    nodes: int = 16,
    schedule: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> Spent:
    """Let as many nodes as there are processes spend a budget, and be killed when a share of it is spent."""
    with stage(WINDOW_S, UNLIMITED, UNLIMITED, **more) as on:
        on.warm_up()
        on.provider.schedule(*schedule)
        items = round(2 * budget / (1 if unit == "calls" else 15))
        numbers, began = list(range(1000, 1000 + items)), time.monotonic()
        asked = [f"{number % KINDS} {number} -{number}" for number in numbers]
        job = on.client.submit(
            operation="llm.map_reduce", items=asked, params={**ASKED, "max_tokens": MOST_TOKENS, "fan_in": 50}, type="parallel",
            chunk_size=-(-items // nodes), budget={unit: budget},
        )  # fmt: skip
        left, random = dict(sorted(kills.items())), Random(1)
        for _ in job.watch(0.05):
            spent = job.spent()
            if left and spent and spent.spent[unit] + spent.held[unit] >= budget * next(iter(left)):
                left.pop(next(iter(left)))
                on.kill_process(random)
        result, seen = job.result(timeout=150), on.provider.report()
        took_s = time.monotonic() - began
    counted = seen["answered"] if unit == "calls" else seen["prompt_tokens"] + seen["completion_tokens"]
    right = {str(numbers[index] % KINDS) for index in result.successful}
    told = result.spent.spent[unit] if result.spent else 0.0
    one_call = 1 if unit == "calls" else MOST_TOKENS + 13
    parts = set(re.split("; |\n\n", result.output or ""))
    return Spent(unit, budget, counted, told, one_call, result.stopped, result.done, parts == right, len(kills), took_s)


MOST_TOKENS = 30
KINDS = 8
"""So many different answers there are: merged, they are no longer than an answer may be."""


# --- d. work beside it is not hindered -------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """How long jobs without limits waited to be started, in ms."""

    alone: list[float]
    beside: list[float]  # while a job waits for its limits

    @property
    def hindrance(self) -> float:
        """By how much the 95th percentile is longer beside the other job."""
        return p95(self.beside) / p95(self.alone)

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return self.hindrance <= MOST_HINDRANCE


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(values, n=20)[-1]


def beside_others(rounds: int, jobs: int, every_s: float = 0.05, **more: Any) -> Beside:
    """Start small jobs one after the other, in turns alone and beside a job that waits for its limits."""
    waits: dict[bool, list[float]] = {False: [], True: []}
    with stage(WINDOW_S, **LIMITS["tokens"], **more) as on:
        on.warm_up()
        for number in range(2 * rounds):
            limited = on.map(range(100_000)) if number % 2 else None
            if limited is not None:
                wait_until(lambda job=limited: "used up" in job.explain())  # type: ignore[misc]  # it is called at once
            for _ in range(jobs):
                small = on.client.submit(operation="sum", items=range(10))
                waits[limited is not None].append(small.result(timeout=20).metrics.waited_ms)
                time.sleep(every_s)  # the rate of the jobs
            if limited is not None:
                limited.cancel()
                limited.wait(20)
    return Beside(waits[False], waits[True])


# --- all of it -------------------------------------------------------------------------------------------


def show(uses: Sequence[Use], answers: Sequence[Answers], spent: Sequence[Spent], beside: Sequence[Beside]) -> None:
    """Print what became of the promises."""
    tables = []
    if uses:
        tables.append(Table("binds", "window", "calls", "429 at first", "429", "used", "least", title="limits"))
    for use in uses:
        shown = (f"{use.calls:,}", str(use.early), str(use.refused), f"{use.used:.2%}", f"{min(use.shares):.2%}")
        tables[-1].add_row(use.binds, f"{use.window_s:g} s", *shown)
    if answers:
        tables.append(Table("operation", "items", "wrong", "failed", "faults", "kills", "again", "took", "gap", title="answers"))
    for each in answers:
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(each.faults.items()))
        shown = (str(each.items), str(each.wrong), str(each.failed), faults, str(each.kills), str(each.again))
        tables[-1].add_row(each.operation, *shown, f"{each.seconds:.1f} s", f"{each.slowest_s:.1f} s")
    if spent:
        tables.append(
            Table("unit", "budget", "counted", "told", "used", "stopped", "done", "merged", "kills", "took", title="budgets")
        )
    for one in spent:
        shown = (f"{one.budget:g}", f"{one.counted:g}", f"{one.told:g}", f"{one.counted / one.budget:.1%}", one.stopped)
        tables[-1].add_row(one.unit, *shown, str(one.done), str(one.merged), str(one.kills), f"{one.seconds:.1f} s")
    if beside:
        tables.append(Table("jobs", "p95 alone", "p95 beside", "x", "medians", title="beside"))
    for it in beside:
        medians = f"{statistics.median(it.alone):.1f} / {statistics.median(it.beside):.1f} ms"
        shown = (f"{p95(it.alone):.1f} ms", f"{p95(it.beside):.1f} ms", f"{it.hindrance:.2f}", medians)
        tables[-1].add_row(str(len(it.beside)), *shown)
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables:
        table.title_justify = "left"
        console.print(table)


KILLS = {0.15: "process", 0.3: "process", 0.45: "worker", 0.7: "process"}


def main() -> int:
    """Run all parts, or the one that is asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--windows", type=int, default=WINDOWS)
    options.add_argument("--window", type=float, default=WINDOW_S, help="seconds that stand for a minute")
    options.add_argument("--part", choices=["use", "answers", "budgets", "beside"], action="append", help="all when left out")
    options.add_argument("--binds", choices=sorted(LIMITS), action="append", help="the limit that binds; both when left out")
    options.add_argument("--priority", default="normal", help="of the job that uses the limits up")
    asked = options.parse_args()
    embedded.clean_up_on_sigterm()
    parts = asked.part or ["use", "answers", "budgets", "beside"]
    uses = [
        against_limits(binds, asked.windows, asked.window, priority=asked.priority)
        for binds in (asked.binds or sorted(LIMITS, reverse=True) if "use" in parts else ())
    ]
    answers = [
        through_faults(operation, items, KILLS)
        for operation, items in ([("llm.map", 1000), ("llm.map_reduce", 200)] if "answers" in parts else ())
    ]
    spent = [
        on_a_budget(unit, budget, {0.3: "process", 0.6: "process"}, slots=8)
        for unit, budget in ([("tokens", 6000.0), ("calls", 400.0)] if "budgets" in parts else ())
    ]
    beside = [beside_others(4, 60)] if "beside" in parts else []
    show(uses, answers, spent, beside)
    return 0 if all(each.kept for each in (*uses, *answers, *spent, *beside)) else 1


if __name__ == "__main__":
    sys.exit(main())
