"""The processes of the guard tests, and a long run of a token bucket against a fake provider.

``python -m tests.faults.guards --window 60`` runs eight processes against a provider with the
limits of `resilience.PROVIDER`.  It prints the share of the limits that was used.  It exits with 1
on a 429, on a window over its limit, or on a use below LEAST_USE.  With ``--decisions 10000`` eight
busy processes use all guards, and it exits with 1 if one of them decides without Redis.

With the name of a role and its arguments the program is one of the processes.  Then it reads
commands and writes events, a line for each."""

from __future__ import annotations

import argparse
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from resilience import (
    PROVIDER,
    BreakerConfig,
    Bulkhead,
    CircuitBreaker,
    CircuitOpen,
    Rate,
    RetryBudget,
    Store,
    TokenBucket,
)
from resilience.store import on_alone
from rlm_tasks.testing import embedded
from tests.faults import provider

ROOT = Path(__file__).parents[2]
NAMESPACE = "guards"
PROCESSES, WINDOWS = 8, 4
LEAST_USE = 0.97
START_S = 60.0
"""Time in seconds in which a process starts, also on a busy machine."""
BUSY_S = 0.004
"""Work in seconds between the decisions of a busy process."""
TOKENS = {"tokens": (1, 99), "requests": (1, 19)}
"""The limit that binds -> smallest and largest request in tokens.

At 25.7 tokens a request both limits of `resilience.PROVIDER` bind at the same time.
"""
AT_MOST = 1.5
"""A request reserves up to this many times the tokens that it uses, and settles the difference."""
TROUBLE = ConnectionError("the service is away")


# --- starting processes -----------------------------------------------------------------------


class Child:
    """A child process; it reads commands and writes events, one line for each."""

    def __init__(self, module: str, *arguments: object) -> None:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line)

    def send(self, *words: object) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def receive(self, first: str, within_s: float = 20.0) -> list[str]:
        """Return the words of its next line without the first, which must be `first`.

        Raises AssertionError on another word, `queue.Empty` without a line within `within_s`.
        """
        found, *words = self._lines.get(timeout=within_s).split()
        assert found == first, (found, words)
        return words

    def kill(self) -> None:
        """Kill it, as the kernel's out-of-memory killer does."""
        # `send_signal` sends nothing to a process that has ended: its pid may be reused.
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Kill it, and close its pipes."""
        self.kill()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@contextmanager
def children(count: int, *arguments: object) -> Iterator[list[Child]]:
    """Run processes of one role for the length of a block; the last argument is its number."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(closing(Child("tests.faults.guards", *arguments, number)))
            for number in range(count)
        ]
        for each in found:
            each.receive("ready", START_S)
        yield found


@contextmanager
def fake_provider(*options: object) -> Iterator[int]:
    """Run a provider for the length of a block; yield its port."""
    with closing(Child("tests.faults.provider", *options)) as child:
        yield int(child.receive("at")[0])


# --- roles ------------------------------------------------------------------------------------


def write(*words: object) -> None:
    """Write a line to the test."""
    print(*words, flush=True)


def stopping() -> threading.Event:
    """Return an event that is set when the test sends a line or has ended."""
    stop = threading.Event()

    def read() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=read, daemon=True).start()
    return stop


def spend(store: Store, port: str, window_s: str, guard_s: str, binds: str, number: str) -> None:
    """Send as many requests as a bucket grants, for the seconds that the test sends.

    At the end write the grants, with the tokens that each has used."""
    limits = rates(float(window_s))
    guard = float(guard_s) if guard_s else None
    bucket = TokenBucket(
        "llm", store, guard_s=guard, requests=limits["requests"], tokens=limits["tokens"]
    )
    random, grants, late_s = Random(number), [], 0.0
    with closing(provider.Line(int(port))) as line:
        write("ready")
        until = time.monotonic() + float(sys.stdin.readline())
        while time.monotonic() < until:
            used = random.randint(*TOKENS[binds])
            reserved = round(used * random.uniform(1.0, AT_MOST))
            grant = bucket.acquire(requests=1, tokens=reserved, max_wait_s=2 * float(window_s))
            if grant:
                late_s = max(late_s, time.time() - grant.at)
                line.ask(f"take {used}")
                grant.settle(tokens=used)
                grants.append((grant.at, used))
    write("done", json.dumps({"grants": grants, "late_s": late_s}, separators=(",", ":")))


def probe(store: Store, port: str, config: str, _number: str) -> None:
    """Call a dependency as often as a breaker allows, until the test sends a line."""
    breaker = CircuitBreaker("dependency", store, BreakerConfig(**json.loads(config)))
    with closing(provider.Line(int(port))) as line:
        write("ready")
        stop = stopping()
        while not stop.is_set():
            try:
                admission = breaker.admit()
            except CircuitOpen:
                time.sleep(0.002)  # the rate of the calls
                continue
            answer = line.ask(f"call {'probe' if admission.probe else 'free'}")
            breaker.ended(admission, None if answer == "200" else TROUBLE)
    write("done")


def observe(store: Store, config: str, _number: str) -> None:
    """Call through a breaker without a pause; write the time when calls pass or are refused."""
    breaker = CircuitBreaker("tripped", store, BreakerConfig(**json.loads(config)))
    write("ready")
    stop, before = stopping(), ""
    while not stop.is_set():
        try:
            breaker.call(lambda: None)
            found = "passes"
        except CircuitOpen:
            found = "refused"
        if found != before:
            write(found, time.time())
            before = found
        time.sleep(0.005)  # the rate of the calls


def trip(store: Store, config: str, _number: str) -> None:
    """At each line of the test, fail until a breaker opens.

    Then write the time at which the failure that opened it began."""
    breaker = CircuitBreaker("tripped", store, BreakerConfig(**json.loads(config)))

    def fail() -> None:
        raise TROUBLE

    write("ready")
    for _ in sys.stdin:
        began = time.time()
        with suppress(CircuitOpen):
            while True:
                began, last = time.time(), began
                with suppress(ConnectionError):
                    breaker.call(fail)
        write("tripped", last)


def hold_probe(store: Store, config: str, _number: str) -> None:
    """Take the permit of a probe, and keep it."""
    breaker = CircuitBreaker("held", store, BreakerConfig(**json.loads(config)))
    write("ready")
    admission = breaker.admit()
    write("holds", time.monotonic(), admission.probe)
    sys.stdin.readline()  # until the test kills this process, or has ended


def hold_permits(store: Store, count: str, lease_s: str, _number: str) -> None:
    """Take permits of a bulkhead, and keep them."""
    bulkhead = Bulkhead("held", store, limit=int(count), per_host=None, lease_s=float(lease_s))
    write("ready")
    taken = [bulkhead.acquire() for _ in range(int(count))]
    write("holds", time.monotonic(), sum(map(bool, taken)), bulkhead.owner)
    sys.stdin.readline()  # until the test kills this process, or has ended


def decide(store: Store, count: str, busy_s: str, _number: str) -> None:
    """Use each kind of guard in turn, with work in between, until the test sends a line.

    At the end write the numbers of decisions with Redis and without it."""
    bucket = TokenBucket("calls", store, calls=Rate(10**6))
    bulkhead = Bulkhead("calls", store, limit=10**6, per_host=None)
    breaker = CircuitBreaker("calls", store)
    budget = RetryBudget("calls", store)
    alone = Counter[str]()
    on_alone(lambda kind: alone.update([kind]))
    write("ready")
    stop, made = stopping(), 0
    while not stop.is_set() and made < int(count):
        spin(float(busy_s))
        breaker.call(lambda: None)
        bucket.acquire()
        bulkhead.acquire().release()
        budget.spend()
        made += 4
        if made == 4:
            write("decides")
    write("done", made, json.dumps(alone, separators=(",", ":")))


def spin(seconds: float) -> None:
    """Use the processor for some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


ROLES: dict[str, Callable[..., None]] = {
    role.__name__: role for role in (spend, probe, observe, trip, hold_probe, hold_permits, decide)
}


# --- a bucket against a provider --------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """The use of a provider's limits; a share of 1.0 is all of a limit."""

    window_s: float
    binds: str
    requests: int
    refused: int  # by the provider, with a 429
    used: dict[str, float]  # share used of each limit, over the windows after the first
    most: dict[str, float]  # largest share of each limit in any window, by the grants' server time
    late_s: float  # longest time from a grant to its request

    @property
    def kept(self) -> bool:
        """Whether no request was refused, no window was over its limit, and the use sufficed."""
        return (
            not self.refused and max(self.most.values()) <= 1 and self.used[self.binds] >= LEAST_USE
        )


def rates(window_s: float) -> dict[str, Rate]:
    """Return a provider's limits for a window of `window_s`: the rate per second stays the same."""
    return {
        name: Rate(rate.limit * window_s / rate.per_s, per_s=window_s)
        for name, rate in PROVIDER.items()
    }


def fullest(uses: Iterable[tuple[float, float]], window_s: float) -> float:
    """Return the largest use in any window; a use is (time, amount)."""
    window: deque[tuple[float, float]] = deque()
    inside = most = 0.0
    for at, amount in sorted(uses):
        window.append((at, amount))
        inside += amount
        while window[0][0] <= at - window_s:
            inside -= window.popleft()[1]
        most = max(most, inside)
    return most


def against_provider(url: str, window_s: float, binds: str, guard_s: float | None = None) -> Use:
    """Let eight processes send all requests that a bucket grants, for four windows.

    Return the use of the limits."""
    limits = {name: rate.limit for name, rate in rates(window_s).items()}
    options = ["--window", window_s, "--requests", limits["requests"], "--tokens", limits["tokens"]]
    with (
        fake_provider(*options) as port,
        children(PROCESSES, "spend", url, port, window_s, guard_s or "", binds) as senders,
    ):
        for each in senders:
            each.send(WINDOWS * window_s + 0.5)
        found = [
            json.loads(each.receive("done", (WINDOWS + 3) * window_s + 20)[0]) for each in senders
        ]
        seen = provider.report(port)
    grants = [(at, tokens) for each in found for at, tokens in each["grants"]]
    return use_of(seen, grants, window_s, binds, max(each["late_s"] for each in found))


def use_of(
    seen: dict[str, Any],
    grants: Sequence[tuple[float, int]],
    window_s: float,
    binds: str,
    late_s: float,
) -> Use:
    """Return the use, from the provider's report and the grants."""
    first = seen["taken"][0][0]
    later = [
        tokens
        for at, tokens in seen["taken"]
        if first + window_s <= at < first + WINDOWS * window_s
    ]
    limits = {name: rate.limit for name, rate in rates(window_s).items()}
    windows = {name: (WINDOWS - 1) * limit for name, limit in limits.items()}
    most = {
        "requests": fullest(((at, 1) for at, _ in grants), window_s),
        "tokens": fullest(grants, window_s),
    }
    return Use(
        window_s,
        binds,
        len(seen["taken"]),
        seen["refused"],
        {"requests": len(later) / windows["requests"], "tokens": sum(later) / windows["tokens"]},
        {name: amount / limits[name] for name, amount in most.items()},
        late_s,
    )


def show(uses: Sequence[Use]) -> None:
    """Print the use of the limits as a table."""
    title = f"{PROCESSES} processes, {WINDOWS} windows"
    table = Table(
        "binds",
        "window",
        "requests",
        "429",
        "used",
        "fullest window",
        "latest",
        title=title,
        title_justify="left",
    )
    for each in uses:
        used, most = (
            [f"{share[name]:.2%}" for name in PROVIDER] for share in (each.used, each.most)
        )
        row = (
            f"{each.requests:,}",
            str(each.refused),
            " / ".join(used),
            " / ".join(most),
            f"{each.late_s * 1000:.1f} ms",
        )
        table.add_row(each.binds, f"{each.window_s:g} s", *row)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    print(
        "used and fullest: requests / tokens; used over the windows after the first,"
        " fullest by the server's time"
    )


# --- decisions of busy processes --------------------------------------------------------------


def decisions(url: str, count: int) -> tuple[int, dict[str, int]]:
    """Let eight busy processes use all kinds of guards, with work in between.

    Return the number of their decisions, and those without Redis by kind of guard."""
    alone = Counter[str]()
    made = 0
    with children(PROCESSES, "decide", url, count // PROCESSES, BUSY_S) as busy:
        for each in busy:
            each.receive("decides", 60)
        for each in busy:
            number, kinds = each.receive("done", 60 + count * BUSY_S)
            made += int(number)
            alone.update(json.loads(kinds))
    return made, dict(alone)


def main() -> int:
    """Run the windows, or the role that the command line names; return the exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in ROLES:
        role, url, *words = sys.argv[1:]
        ROLES[role](Store.from_url(url, namespace=NAMESPACE), *words)
        return 0
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--window", type=float, default=60.0, help="seconds")
    options.add_argument(
        "--binds",
        choices=sorted(TOKENS),
        action="append",
        help="the limit that binds; default: both, in turn",
    )
    options.add_argument(
        "--guard",
        type=float,
        help="seconds by which a window counts longer; default: that of TokenBucket",
    )
    options.add_argument(
        "--decisions", type=int, help="let busy processes decide this often, and do nothing else"
    )
    asked = options.parse_args()
    embedded.clean_up_on_sigterm()
    if asked.decisions:
        with embedded.server() as server:
            made, alone = decisions(server.url, asked.decisions)
        print(f"{made:,} decisions of {PROCESSES} busy processes, without Redis: {alone or 'none'}")
        return 1 if alone else 0
    uses = []
    for binds in asked.binds or sorted(TOKENS, reverse=True):
        with embedded.server() as server:
            uses.append(against_provider(server.url, asked.window, binds, asked.guard))
    show(uses)
    return 0 if all(each.kept for each in uses) else 1


if __name__ == "__main__":
    sys.exit(main())
