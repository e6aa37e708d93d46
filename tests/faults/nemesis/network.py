"""The network between the processes and Redis: it drops, delays, cuts and refuses calls at random.

`Wire` is a redis-py client whose every call goes through `Network.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.faults.nemesis.servers import REFUSALS, Command, HistoryServer, name_of, refusal
from tests.faults.nemesis.simulation import Simulation

LATENCY_S = (0.0002, 0.002)
KINDS = {
    "drop request": 3,
    "drop answer": 3,
    "cut": 2,
    "delay": 4,
    "late request": 3,
    "refuse": 4,
    "kill": 1,
}
"""The faults of one call, with their weights."""


@dataclass
class Plan:
    """The faults of a history: drawn in order, so each has a number, and some may be left out."""

    random: Random
    rate: float  # faults per call while the storm lasts
    most: int
    left_out: frozenset[int] = frozenset()
    drawn: int = 0
    happened: int = 0
    calm: bool = False

    def next(self) -> bool:
        """Count a fault, and return whether it happens."""
        if self.calm or self.drawn >= self.most:
            return False
        self.drawn += 1
        happens = self.drawn not in self.left_out
        self.happened += happens
        return happens


class Network:
    """All connections of a history."""

    def __init__(
        self, simulation: Simulation, server: HistoryServer, plan: Plan, lease_s: float
    ) -> None:
        self.simulation, self.server, self.plan = simulation, server, plan
        self.lease_s = lease_s
        self.down = False
        self.calls = 0
        self.kill: Callable[[], bool] = lambda: False  # kills the process that calls

    def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """Send commands in one round trip; return an answer or a ResponseError for each.

        Raises redis-py's errors of lost connections.
        """
        simulation, random = self.simulation, self.simulation.random
        names = "+".join(name_of(args) for args, _ in commands)
        simulation.sleep(random.uniform(*LATENCY_S))
        if self.down:
            raise RedisConnectionError("Error 111 connecting to nemesis:6379. Connection refused.")
        kind = self._fault()
        if kind:
            return self._hurt(kind, commands, names, timeout_s)
        answers = self._execute(commands, names)
        simulation.sleep(random.uniform(*LATENCY_S))
        self._received()
        return answers

    def _fault(self) -> str:
        plan = self.plan
        if plan.calm or plan.random.random() >= plan.rate:
            return ""
        kind = plan.random.choices(list(KINDS), list(KINDS.values()))[0]
        return kind if plan.next() else ""

    def _hurt(
        self, kind: str, commands: Sequence[Command], names: str, timeout_s: float
    ) -> list[Any]:
        """Let a fault happen to a call."""
        random, simulation = self.plan.random, self.simulation
        number = f"fault {self.plan.drawn}: {kind}"
        if kind == "refuse":
            word = random.choice(list(REFUSALS))
            simulation.note(f"{names}: {number} {word}")
            if word == "LOADING":
                raise refusal(word)
            return [refusal(word) for _ in commands]
        if kind == "kill":
            before = random.random() < 0.5
            simulation.note(f"{names}: {number} {'before' if before else 'after'}")
            answers = [] if before else self._execute(commands, names)
            self.kill()
            return answers or self._execute(commands, names)
        if kind == "delay":
            return self._delayed(random.uniform(0, 2 * self.lease_s), commands, names, timeout_s)
        if kind == "late request":
            late_s = timeout_s + random.uniform(0, 2 * self.lease_s)
            return self._delayed(late_s, commands, names, timeout_s)
        done = {"drop request": 0, "drop answer": len(commands)}.get(
            kind, random.randint(0, len(commands))
        )
        simulation.note(f"{names}: {number} after {done} of {len(commands)}")
        self._execute(commands[:done], names)
        if random.random() < 0.5:
            raise RedisConnectionError("Connection reset by peer")
        simulation.sleep(timeout_s)
        raise RedisTimeoutError("Timeout reading from nemesis:6379")

    def _delayed(
        self, late_s: float, commands: Sequence[Command], names: str, timeout_s: float
    ) -> list[Any]:
        """Execute a call late; a caller that has given up does not get the answer."""
        simulation = self.simulation
        simulation.note(f"{names}: fault {self.plan.drawn}: executed {late_s:.1f} s late")
        if late_s < timeout_s:
            simulation.sleep(late_s)
            if self.down:
                raise RedisConnectionError("Connection closed by server.")
            answers = self._execute(commands, names)
            self._received()
            return answers

        def arrive() -> None:
            simulation.sleep(late_s - timeout_s)
            if not self.down:
                simulation.note(f"{names}: arrives after its caller gave up")
                with suppress(RedisConnectionError):
                    self._execute(commands, names)

        simulation.sleep(timeout_s)
        simulation.start("late request", arrive)
        raise RedisTimeoutError("Timeout reading from nemesis:6379")

    def _execute(self, commands: Sequence[Command], names: str) -> list[Any]:
        self.calls += 1
        answers: list[Any] = []
        for command in commands:
            try:
                answers.append(self.server.execute(command))
            except ResponseError as error:
                answers.append(error)
        self.simulation.note(f"{names} -> {answers!r:.150}")
        return answers

    def _received(self) -> None:
        if self.down:
            raise RedisConnectionError("Connection closed by server.")
        self.server.acknowledge()


class Wire(redis.Redis):
    """A client of redis-py whose commands go through the network of a history."""

    def __init__(self, network: Network, timeout_s: float) -> None:
        super().__init__()
        self._network, self._timeout_s = network, timeout_s

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command."""
        [answer] = self._network.exchange([(args, options)], self._timeout_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        """Return a pipeline that goes through the network."""
        return _WirePipeline(self._network, self._timeout_s, self)


class _WirePipeline(Pipeline):
    def __init__(self, network: Network, timeout_s: float, client: redis.Redis) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)  # type: ignore[no-untyped-call]
        self._network, self._timeout_s = network, timeout_s

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Run the commands in one round trip."""
        commands, self.command_stack = self.command_stack, []
        answers = self._network.exchange(commands, self._timeout_s) if commands else []
        if raise_on_error:
            self.raise_first_error(commands, answers)  # type: ignore[no-untyped-call]
        return answers


class Direct(redis.Redis):
    """A client of the checks, which no fault meets and which takes no time."""

    def __init__(self, server: HistoryServer) -> None:
        super().__init__()
        self._server = server

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command."""
        return self._server.execute((args, options))
