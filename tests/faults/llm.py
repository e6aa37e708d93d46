"""Calls to models through the whole platform, against a provider with true sliding windows.

``python -m tests.faults.llm`` runs two workers of four processes against the fake provider, which
counts every token.  A window of 10 s stands for a minute.  It prints a table for each
part: use of limits, exactness after faults and kills, budgets, refused items, other jobs.  It exits
with 1 when a promise is broken.  `tests/faults/test_llm.py` calls the parts; begin with
`stage`."""

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

from rlm_tasks import Client, Job, JobResult
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

WINDOWS, WINDOW_S = 30, 10.0
WORKERS, SLOTS = 2, 4
LATENCY_S = 0.05
"""The provider's time for an answer; it corresponds to 0.3 s with windows of a minute."""
LEAST_USE, MOST_HINDRANCE, MOST_REFUSED = 0.97, 1.1, 1.2
SCALES = (0.25, 1.0)
"""Scales of the limits for the last part: at the first the machine is nearly idle, at the second
the calls keep it half busy.
"""
UNLIMITED = 1e9
LIMITS = {
    "tokens": {"requests": UNLIMITED, "tokens": 700.0},
    "requests": {"requests": 45.0, "tokens": UNLIMITED},
    "": {"requests": UNLIMITED, "tokens": UNLIMITED},
}
"""The limit that binds -> limits per second: 40 to 50 calls, fewer than two cores can make."""
FAULTS = ("429", "slow", "500", "garbage", "cut", "empty", "timeout")
ATTEMPTS = 8
"""Attempts of an item: with these no item fails for good, though more than one call in ten fails.
"""
TIMEOUT_S = 1.0
STREAMED = {"RLM_LLM__ENDPOINTS": '[{"name": "main", "stream": true}]'}
"""The setting for streamed answers."""
LATE = [{"kind": "slow", "every": 5, "seconds": TIMEOUT_S}]
"""Answers that the provider gives, and counts, after the caller's timeout."""


# --- provider and workers ---------------------------------------------------------------------


@dataclass
class Stage:
    """A provider, and workers that a test can kill and start again."""

    provider: fake_provider.Running
    client: Client
    start: Callable[[int], subprocess.Popen[bytes]]
    workers: list[subprocess.Popen[bytes]]
    slots: int
    binds: str  # the limit that is met first, '' when none is
    limit: float  # in any window
    window_s: float

    def warm_up(self) -> None:
        """Let every process make a call, then reset; imports take longer than a window."""
        processes = len(self.workers) * self.slots
        while self.provider.report()["connections"] < processes:
            # A node of one item opens one connection, and its process keeps it.
            self.map(
                range(2 * processes), priority="critical", type="parallel", chunk_size=1
            ).result(timeout=60)
        self.reset()

    def reset(self, *schedule: Mapping[str, Any]) -> None:
        """Reset the provider's counts; from now on calls fail by the schedule."""
        self.provider.reset()
        self.provider.schedule(*schedule)

    def map(self, numbers: Sequence[int], **more: Any) -> Job:
        """Submit a job that asks for the sum of each number and its double."""
        items = [f"{number} {2 * number}" for number in numbers]
        return self.client.submit(operation="llm.map", items=items, params=ASKED, **more)

    def kill_process(self) -> None:
        """Kill the pool process with the most processor time, as the out-of-memory killer does."""
        children = [
            each for worker in self.workers for each in psutil.Process(worker.pid).children()
        ]
        with suppress(psutil.NoSuchProcess):
            max(children, key=lambda each: each.cpu_times().user).kill()

    def kill_worker(self) -> None:
        """Kill a whole worker, as a lost machine does, and start another."""
        os.killpg(self.workers[0].pid, signal.SIGKILL)
        self.workers[0].wait()
        self.workers[0] = self.start(0)


ASKED = {"prompt": "What is the sum of these two? SUM: {item}", "max_tokens": 4}
"""Parameters of every item: a prompt of 11 to 13 tokens, an answer of one or two."""
PAID_TOKENS = 13.5
"""Tokens of a prompt and its answer, on average."""


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
    """Run a provider with a limit, and workers with the same limit, for the length of a block.

    Every process has made a call when the block begins.  The limit is that of LIMITS, scaled.
    Workers count windows `guard_s` longer than the provider, since a busy machine delays requests.
    """
    limits: dict[str, float] = {
        name: round(rate * scale * window_s) for name, rate in LIMITS[binds].items()
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm-llm-")))
        server = stack.enter_context(embedded.server())
        provider = stack.enter_context(
            fake_provider.running((), **limits, window=window_s, latency=LATENCY_S)
        )
        own_limits = {f"RLM_LLM__{name.upper()}": str(limit) for name, limit in limits.items()}
        usual = {
            "RLM_LLM__WINDOW_S": str(window_s + guard_s),
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_API_KEY": "any",
            "RLM_LLM__TIMEOUT_S": str(TIMEOUT_S),
            "RLM_LLM__ATTEMPTS": str(ATTEMPTS),
            "RLM_LEDGER__LEASE_S": "2",
            "RLM_LEDGER__SWEEP_S": "0.5",
        }
        environment = {**environment_of(server.url, "llm"), **own_limits, **usual, **more}

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
    """The use of a limit; a share of 1.0 is all of it."""

    binds: str
    window_s: float
    calls: int
    early: int  # answers with 429 in the first window
    refused: int  # answers with 429 after it
    shares: list[float]  # used in each window after the first

    @property
    def used(self) -> float:
        """Share used, over all windows after the first."""
        return statistics.fmean(self.shares)

    @property
    def row(self) -> dict[str, str]:
        """The row of the table."""
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
        """Whether no call was refused after the first window, and the use sufficed."""
        return not self.refused and self.used >= LEAST_USE


def against_limits(on: Stage, windows: int, *, priority: str = "normal") -> Use:
    """Let a job call as often as its limits allow, for some windows; return the use."""
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


# --- b. answers are exact in spite of faults --------------------------------------------------


def schedule(every: int) -> list[dict[str, Any]]:
    """Return a schedule of faults: the first kind at each `every`th call, each next less often."""
    about = {"seconds": 0.2, "headers": {"retry-after-ms": "100"}}
    return [
        {"kind": kind, "every": every + 3 * number, **about} for number, kind in enumerate(FAULTS)
    ]


@dataclass(frozen=True)
class Answers:
    """The result of a job during which calls failed and processes were killed."""

    operation: str
    items: int
    wrong: int  # wrong answers, or missing ones
    failed: int
    faults: dict[str, int]  # number of the provider's faults, by kind
    kills: int
    again: int  # answers that were paid for again, after the first was lost
    seconds: float
    slowest_s: float  # longest time without a new answer

    @property
    def row(self) -> dict[str, str]:
        """The row of the table."""
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
        """Whether no answer is wrong, and no item has failed."""
        return not (self.wrong or self.failed)


def through_faults(
    on: Stage, operation: str, items: int, kills: Mapping[float, str], every: int = 45
) -> Answers:
    """Run a job while calls fail by a schedule.

    `kills` maps the share of items done to the kind of process that is killed then."""
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
    wrong += items - len(texts) - result.failed_count  # the other items are lost
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
    """Return the fake model's answer when it merges texts in groups until one is left."""
    while len(texts) > 1:
        groups = [texts[at : at + FAN_IN] for at in range(0, len(texts), FAN_IN)]
        texts = ["; ".join(sorted(set(group))) for group in groups]
    return texts[0]


def _kill_on_the_way(on: Stage, job: Job, kills: Mapping[float, str]) -> float:
    """Kill processes at some shares of the items done.

    Return the longest time without a new answer, in seconds."""
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
    """The spending of a budget that is too small for its job."""

    unit: str
    budget: float
    counted: float  # by the provider
    reported: float  # by the job
    one_call: float  # the largest cost of one call
    stopped: str
    done: int
    merged: bool  # the result holds the answer of every done item, and nothing else
    kills: int
    seconds: float

    @property
    def row(self) -> dict[str, str]:
        """The row of the table."""
        return {
            "budget": f"{self.budget:g} {self.unit}",
            "counted": f"{self.counted:g}",
            "reported": f"{self.reported:g}",
            "used": f"{self.counted / self.budget:.1%}",
            "stopped": self.stopped,
            "done": str(self.done),
            "merged": str(self.merged),
            "kills": str(self.kills),
            "took": f"{self.seconds:.1f} s",
        }

    @property
    def kept(self) -> bool:
        """Whether the budget held to one call, the report covers it, and the result is merged."""
        held = self.counted <= self.budget + self.one_call and self.reported >= self.counted
        return held and self.stopped == "budget" and self.merged


def on_a_budget(
    on: Stage, unit: str, budget: float, kills: Sequence[float] = (), *, late: bool = False
) -> Spent:
    """Let 16 nodes spend a budget at once, and kill processes when some shares of it are spent.

    With `late`, many answers come after the caller's timeout.
    """
    on.reset(*LATE if late else ())
    items, began = round(2 * budget / (1 if unit == "calls" else PROMPT_TOKENS)), time.monotonic()
    asked, is_right = _long(items) if late else _alike(items)
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
    reported, counted = (
        result.spent,
        seen["answered"] if unit == "calls" else seen["prompt_tokens"] + seen["completion_tokens"],
    )
    one_call = 1 if unit == "calls" else PROMPT_TOKENS + MOST_TOKENS
    return Spent(
        f"{unit}, late" if late else unit,
        budget,
        counted,
        reported.spent[unit] if reported else 0.0,
        one_call,
        result.stopped,
        result.done,
        is_right(result),
        len(kills) - len(left),
        time.monotonic() - began,
    )


# --- d. budgets hold against odd answers ------------------------------------------------------

ODD = (
    *("refused", "filtered", "filtered-part", "tool-call", "reasoning-only", "empty-text", "null"),
    *("usage-missing", "usage-negative", "usage-zeros", "usage-total-only", "usage-texts"),
    *("usage-reasoning-in-total", "no-choices", "not-json", "cut-chunks", "short-body"),
    *("reset", "reset-after-headers", "html-502", "timeout-504", "server-error", "cut-text"),
    *("error-event", "unfinished", "json-instead", "events-instead", "delta-null"),
)
"""Odd answers that bill tokens in one way or another, and some that do not."""


def in_a_storm(on: Stage, seed: int, budget: float, kind: str = "whole") -> Spent:
    """Let all processes spend a budget of tokens while half of the answers are odd.

    The seed chooses the odd answers and a process that is killed; `kind` is for the table."""
    random, began = Random(seed), time.monotonic()
    kinds = random.sample(ODD, 12)
    on.reset(*({"kind": kind, "every": random.randint(7, 29)} for kind in kinds))
    items = round(2 * budget / PROMPT_TOKENS)
    asked, _ = _long(items)
    job = on.client.submit(
        **asked,
        type="parallel",
        chunk_size=-(-items // 16),
        budget={"tokens": budget},
        continue_on_error=True,
    )
    kill_at = random.uniform(0.1, 0.8) * budget
    for _ in job.watch(0.02):
        spent = job.spent()
        if kill_at and spent and spent.spent["tokens"] >= kill_at:
            kill_at = 0.0
            on.kill_process()
    result, seen = job.result(timeout=150, propagate=False), on.provider.report()
    return Spent(
        unit=f"tokens, seed {seed}, {kind}",
        budget=budget,
        counted=seen["prompt_tokens"] + seen["completion_tokens"],
        reported=result.spent.spent["tokens"] if result.spent else 0.0,
        one_call=PROMPT_TOKENS + MOST_TOKENS,
        stopped=result.stopped,
        done=result.done,
        merged=result.done + result.failed_count + result.skipped == items,
        kills=int(not kill_at),
        seconds=time.monotonic() - began,
    )


PROMPT_TOKENS, MOST_TOKENS = 30, 30
KINDS = 8
"""Number of different answers: all of them together fit into the length of one answer."""
Right = Callable[[JobResult], bool]


def _alike(items: int) -> tuple[dict[str, Any], Right]:
    """Return the fields of a job that merges few different answers, and a check of its result."""
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
    """Return the fields of a job with answers as long as its prompts, and a check of its result."""
    texts = [f"{number} in a number of considerations" for number in range(items)]
    asked = {
        "operation": "llm.map",
        "params": {"prompt": "{item}", "max_tokens": MOST_TOKENS},
        "items": texts,
    }
    return asked, lambda it: it.output == [texts[index] for index in it.successful]


# --- e. refused items do not delay others -----------------------------------------------------


@dataclass(frozen=True)
class Refusals:
    """Jobs of which each third item is refused, in turn with jobs without refusals."""

    items: int
    plain_s: list[float]  # seconds of each job without refusals
    refused_s: list[float]
    calls: int  # the provider's count, for the jobs with refusals
    failed: int
    done: int
    opened: int  # breakers that are open or half-open at the end

    @property
    def share(self) -> float:
        """The median time with refusals, as a multiple of the one without."""
        return statistics.median(self.refused_s) / statistics.median(self.plain_s)

    @property
    def row(self) -> dict[str, str]:
        """The row of the table."""
        return {
            "jobs": f"{len(self.refused_s)} of {self.items} items",
            "done": str(self.done),
            "refused": str(self.failed),
            "calls": str(self.calls),
            "open breakers": str(self.opened),
            "median without": f"{statistics.median(self.plain_s):.2f} s",
            "median with": f"{statistics.median(self.refused_s):.2f} s",
            "x": f"{self.share:.2f}",
        }

    @property
    def kept(self) -> bool:
        """Whether each item had one call, each good one is done, and the time is about equal."""
        each_once = self.calls == self.done + self.failed == self.items * len(self.refused_s)
        return each_once and not self.opened and self.share <= MOST_REFUSED


def beside_refusals(on: Stage, items: int, pairs: int) -> Refusals:
    """Run jobs with and without refusals in turn."""
    on.reset()
    plain_s, refused_s, calls, failed, done = list[float](), list[float](), 0, 0, 0
    for number in range(pairs):
        for odd, times in (("", plain_s), (" ODD-ANSWER: refused", refused_s)):
            texts = [f"{number} {at} of {len(odd)}{odd * (at % 3 == 0)}" for at in range(items)]
            before, began = on.provider.report()["requests"], time.monotonic()
            result = on.client.execute(
                operation="llm.map",
                items=texts,
                params={"prompt": "{item}", "max_tokens": MOST_TOKENS},
                continue_on_error=True,
                timeout=60,
            )
            times.append(time.monotonic() - began)
            if odd:
                calls += on.provider.report()["requests"] - before
                failed, done = failed + result.failed_count, done + result.done
    opened = sum(each["state"] != "closed" for each in on.client.breakers.status().values())
    return Refusals(items, plain_s, refused_s, calls, failed, done, opened)


# --- f. other jobs are not delayed ------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """The start delays of jobs without limits, in ms."""

    rate: float  # calls per second
    alone: list[float]
    by_hand: list[float]  # beside a script that makes the same calls without a worker
    beside: list[float]  # beside a job that makes these calls, and waits for its limits
    nodes: int  # of that job: the nodes that run or wait at the end

    @property
    def hindrance(self) -> float:
        """The 95th percentile beside the other job, as a multiple of the one alone."""
        return p95(self.beside) / p95(self.alone)

    @property
    def row(self) -> dict[str, str]:
        """The row of the table."""
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
        """Whether the delay stays below MOST_HINDRANCE.

        Waits are a few milliseconds long, and reported in whole milliseconds."""
        return self.hindrance <= MOST_HINDRANCE


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(values, n=20)[-1]


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def beside_others(on: Stage, rounds: int, jobs: int, every_s: float = 0.05) -> Beside:
    """Start small jobs one after the other; return their start delays.

    Each round starts them alone, beside a job that waits for its limits, and beside its calls.
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
        with calls_by_hand(on, 0.9 * rate):  # at the full rate some would be refused
            start_small_ones(by_hand)
    return Beside(rate, alone, by_hand, beside, most)


@contextmanager
def limited_job(on: Stage) -> Iterator[Job]:
    """Run a job with limits for the length of a block.

    When the block begins, the job has used up its limits once, and waits for them."""
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
    """Make `rate` calls per second for the length of a block, in a process without the platform."""
    command = [sys.executable, "-m", "tests.faults.by_hand", on.provider.base_url, str(rate)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: bool(on.provider.report()["taken"]))
        yield
    finally:
        process.kill()
        process.wait()


# --- all of it --------------------------------------------------------------------------------


Found = Use | Answers | Spent | Refusals | Beside


def show(*found: Found) -> None:
    """Print a table for each kind of result."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for kind in dict.fromkeys(map(type, found)):
        rows = [each.row for each in found if type(each) is kind]
        table = Table(*rows[0], "kept", title=kind.__name__.lower(), title_justify="left")
        for row, kept in zip(
            rows, (each.kept for each in found if type(each) is kind), strict=True
        ):
            table.add_row(*row.values(), "yes" if kept else "[bold]no")
        console.print(table)


PARTS = ["use", "answers", "budgets", "storm", "refusals", "beside"]
STORMS = 20
"""Storms with whole answers; the same number with streamed ones."""
KILLS = {0.15: "process", 0.3: "process", 0.45: "worker", 0.7: "process"}


def main() -> int:
    """Run all parts, or the parts that the command line names; return the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--windows", type=int, default=WINDOWS)
    options.add_argument(
        "--window", type=float, default=WINDOW_S, help="seconds that stand for a minute"
    )
    options.add_argument(
        "--guard", type=float, default=0.0, help="seconds by which workers count a window longer"
    )
    options.add_argument(
        "--priority", default="normal", help="the priority of the first part's job"
    )
    options.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        help="a part to run; default: all",
    )
    options.add_argument(
        "--binds", choices=["tokens", "requests"], action="append", help="default: both, in turn"
    )
    asked = options.parse_args()
    embedded.clean_up_on_sigterm()
    parts, found = asked.part or PARTS, list[Found]()
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
    if "storm" in parts:
        for kind, more in (("whole", {}), ("streamed", STREAMED)):
            with stage(slots=8, RLM_BREAKERS__ENABLED="0", **more) as on:
                found += [in_a_storm(on, seed, 3000.0, kind) for seed in range(STORMS)]
    if "refusals" in parts:
        with stage() as on:
            found.append(beside_refusals(on, 200, 7))
    if "beside" in parts:
        for scale in SCALES:
            with stage("tokens", asked.window, scale=scale) as on:
                found.append(beside_others(on, 4, 60))
    show(*found)
    return 0 if all(each.kept for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
