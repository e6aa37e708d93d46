"""Virtual time: the processes of a simulated platform run as threads, and one runs at a time.

A process runs until it pauses.  Then the process with the earliest end of its pause goes on.  So a
seed gives the same history every time, and a wait of a minute costs nothing.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from random import Random
from typing import Any

EPOCH_S = 1_800_000_000.0
"""The time of the server's clock when a history begins."""


class Ended(BaseException):
    """The history is over, and its processes end."""


class Stuck(AssertionError):
    """No process has anything left to do, or a process did not pause."""


class Process:
    """A process of the simulated platform; a dead one never goes on, as after SIGKILL."""

    def __init__(self, name: str, pid: int, work: Callable[[], None], host: Any = None) -> None:
        self.name, self.pid, self.host = name, pid, host
        self.dead = False
        self.frozen_until = 0.0
        self.due = 0  # the number of its latest pause: earlier ones no longer count
        self.gate = _closed()
        self.thread = threading.Thread(target=work, name=name, daemon=True)


def _closed() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


class Simulation:
    """The time, the processes, the random choices and the trace of one history."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.clock_offset_s = 0.0  # server's time less that of the hosts
        self.random = Random(seed)
        self.trace: list[tuple[float, str, str]] = []
        self.error: BaseException | None = None
        self.over = False
        self._turns: list[tuple[float, int, Process]] = []
        self._numbers, self._pids = itertools.count(1), itertools.count(10_000_001)
        self._main = _closed()
        self._processes: list[Process] = []
        self.current: Process | None = None

    # --- clocks --------------------------------------------------------------------------------

    def monotonic(self) -> float:
        """Return the seconds since the history began."""
        return self.now

    def machine_time(self) -> float:
        """Return the time of the hosts' clocks, in seconds since 1970."""
        return EPOCH_S + self.now

    def server_time(self) -> float:
        """Return the time of the server's clock, in seconds since 1970."""
        return EPOCH_S + self.now + self.clock_offset_s

    # --- processes -----------------------------------------------------------------------------

    def start(self, name: str, work: Callable[[], None], host: Any = None) -> Process:
        """Start a process, which runs as soon as the others pause."""

        def run() -> None:
            process.gate.acquire()
            try:
                if not self.over:
                    work()
            except Ended:
                pass
            except BaseException as error:  # a fault of the simulation, or of the code under test
                self.error = self.error or error
            process.dead = True
            if not self.over:
                self._main.release()

        process = Process(name, next(self._pids), run, host)
        self._processes.append(process)
        process.thread.start()
        self._plan(process, self.now)
        return process

    def sleep(self, seconds: float) -> None:
        """Pause the process that runs."""
        process = self.current
        assert process is not None, "only a process of the simulation may pause"
        if self.over:
            raise Ended
        self._plan(process, self.now + max(0.0, seconds))
        self._main.release()
        process.gate.acquire()
        if self.over:
            raise Ended

    def wake(self, process: Process, delay_s: float) -> None:
        """End the pause of a process after `delay_s`."""
        self._plan(process, self.now + delay_s)

    def note(self, what: str) -> None:
        """Add a line to the trace."""
        self.trace.append((self.now, self.current.name if self.current else "", what))

    def run(self, until: Callable[[], bool], at_most_s: float) -> None:
        """Run the processes until a condition holds, or for `at_most_s` seconds of virtual time.

        Raises the first error of a process.
        """
        end = self.now + at_most_s
        while self._turns and not until():
            at, number, process = heapq.heappop(self._turns)
            if process.dead or number != process.due:
                continue
            if at < process.frozen_until:
                self._plan(process, process.frozen_until)
                continue
            if at > end:
                heapq.heappush(self._turns, (at, number, process))
                self.now = end
                return
            self.now = max(self.now, at)
            self._give_turn(process)
            if self.error is not None:
                raise self.error

    def end(self) -> None:
        """End all processes, also those that are dead for the platform."""
        self.over = True
        for process in self._processes:
            if process.thread.is_alive():
                self.current = process
                process.gate.release()
                process.thread.join(10)
                if process.thread.is_alive():
                    raise Stuck(f"{process.name} does not end")

    def _plan(self, process: Process, at: float) -> None:
        process.due = next(self._numbers)
        heapq.heappush(self._turns, (at, process.due, process))

    def _give_turn(self, process: Process) -> None:
        self.current = process
        process.gate.release()
        if not self._main.acquire(timeout=60):
            raise Stuck(f"{process.name} has not paused for a minute")
        self.current = None
