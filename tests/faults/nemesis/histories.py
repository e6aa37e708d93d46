"""One history: random jobs on a simulated cluster, a storm of faults, then calm, then the checks.

Begin with `run_history`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from unittest.mock import patch

from resilience.keys import Keys
from resilience.retry import RetryPolicy
from resilience.store import Store
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.server_clock import ServerClock
from rlm_tasks.results import Status
from tests.faults.nemesis.cluster import LEASE_S, SWEEP_S, Cluster, known_operations
from tests.faults.nemesis.jobs import HistoryJob, World, random_job, violations
from tests.faults.nemesis.network import Direct, Network, Plan
from tests.faults.nemesis.servers import (
    FakeServer,
    HistoryServer,
    RealServer,
    fakeredis_on,
)
from tests.faults.nemesis.simulation import Simulation

STORM_S = 15.0
CALM_S = 3600.0
SWEEPS = 20
"""After the storm the jobs must end within this number of sweeps, and the time of their items."""


@dataclass
class Outcome:
    """The result of a history."""

    seed: int
    violations: list[str]
    trace: list[tuple[float, str, str]]
    faults: int  # that happened
    drawn: int  # with those that were left out
    calls: int
    calm_s: float  # from the end of the storm to the end of the last job
    states: list[str] = field(default_factory=list)


class Storm:
    """The faults of servers, hosts and clocks; those of single calls are the network's."""

    def __init__(self, cluster: Cluster, network: Network, jobs: Sequence[HistoryJob]) -> None:
        self._cluster, self._network, self._jobs = cluster, network, jobs
        self._simulation, self._plan = cluster.simulation, network.plan
        self._events = {
            self._restart: 2,
            self._restart_from_the_past: 2,
            self._step_clock: 2,
            self._refuse: 3,
            self._flicker: 2,
            self._lose_queues: 1,
            self._forget_scripts: 1,
            self._kill_process: 1,
            self._kill_worker: 1,
            self._freeze_worker: 2,
        }

    def rage(self) -> None:
        """Let something happen every few seconds, until the storm is over."""
        random = self._plan.random
        while self._simulation.now < STORM_S:
            self._simulation.sleep(random.expovariate(1 / 4))
            [event] = random.choices(list(self._events), list(self._events.values()))
            if self._simulation.now < STORM_S and self._plan.next():
                self._note(event.__name__.strip("_").replace("_", " "))
                event()

    def _note(self, what: str) -> None:
        self._simulation.note(f"fault {self._plan.drawn}: {what}")

    def _restart(self, lost_s: float = 0.0) -> None:
        """Kill Redis and start it again: acknowledged writes are kept."""
        self._network.down = True
        if lost_s:  # a node that was given back may be held by nobody again
            self._cluster.losses.update(job.id for job in self._jobs)
        self._network.server.restart(lost_s)
        if lost_s and self._plan.random.random() < 0.5:
            self._cluster.broker.waiting.clear()  # it was in the same Redis
        self._simulation.sleep(self._plan.random.uniform(0.05, 5.0))
        self._network.down = False

    def _restart_from_the_past(self) -> None:
        """Restart Redis without the writes of the last seconds, as after a power failure."""
        self._restart(self._plan.random.uniform(0.1, 3.0))

    def _step_clock(self) -> None:
        """Move the server's clock: forward by up to half an hour, or back by up to a lease."""
        by_s = self._plan.random.choice(
            [self._plan.random.uniform(0, 1800), self._plan.random.uniform(-LEASE_S, 0)]
        )
        self._simulation.clock_offset_s += by_s
        self._note(f"the server's clock steps by {by_s:+.1f} s")

    def _refuse(self) -> None:
        """Let Redis refuse for some seconds."""
        word = self._plan.random.choice(self._network.server.words)
        self._note(f"Redis answers {word}")
        self._network.server.refuse(word)
        self._simulation.sleep(self._plan.random.uniform(0.1, LEASE_S))
        self._network.server.refuse("")

    def _flicker(self) -> None:
        """Let Redis refuse, and accept again after milliseconds, for a while."""
        random = self._plan.random
        word = random.choice(self._network.server.words)
        self._note(f"Redis answers {word} now and then")
        for _ in range(20):
            self._network.server.refuse(word)
            self._simulation.sleep(random.uniform(0.001, 0.1))
            self._network.server.refuse("")
            self._simulation.sleep(random.uniform(0.001, 0.1))

    def _lose_queues(self) -> None:
        self._cluster.broker.waiting.clear()

    def _forget_scripts(self) -> None:
        self._network.server.forget_scripts()

    def _kill_process(self) -> None:
        worker = self._plan.random.choice(self._cluster.workers)
        alive = [each for each in worker.pool if not each.dead]
        if alive and not worker.supervisor.dead:
            worker.kill_process(self._plan.random.choice(alive))

    def _kill_worker(self) -> None:
        self._plan.random.choice(self._cluster.workers).kill()
        self._simulation.sleep(self._plan.random.uniform(0, LEASE_S))
        self._cluster.replace_dead_workers()

    def _freeze_worker(self) -> None:
        """Stop all processes of a worker, as SIGSTOP or a paused virtual machine does."""
        worker = self._plan.random.choice(self._cluster.workers)
        self._cluster.note_losses(worker, {each.pid for each in worker.pool})
        for process in worker.processes():
            process.frozen_until = self._simulation.now + self._plan.random.uniform(0, 2 * LEASE_S)


def run_history(
    seed: int, left_out: frozenset[int] = frozenset(), real: RealServer | None = None
) -> Outcome:
    """Run one history and return what it showed; `left_out` are the numbers of faults to omit."""
    random = Random(seed)
    simulation = Simulation(random.getrandbits(64))
    plan = Plan(Random(random.getrandbits(64)), random.choice([0.0, 0.02, 0.05, 0.1]), 60, left_out)
    with _on_virtual_time(simulation, random):
        server: HistoryServer
        if real is None:
            server = FakeServer(simulation.server_time, plan.random)
        else:
            server = real
            real.begin(simulation.server_time, plan.random)
        network = Network(simulation, server, plan, LEASE_S)
        try:
            return _played(seed, simulation, network, random)
        finally:
            simulation.end()


def _played(seed: int, simulation: Simulation, network: Network, random: Random) -> Outcome:
    cluster = Cluster(network, random)
    jobs = [random_job(random) for _ in range(random.choice([1, 1, 2]))]
    with patch("rlm_tasks.worker.supervisor.cause_of_death", cluster.cause_of_death):
        for number, job in enumerate(jobs):
            simulation.start(
                f"client {number + 1}",
                lambda job=job: cluster.submit_until_known(job, lambda: simulation.over),
            )
        storm = simulation.start("storm", Storm(cluster, network, jobs).rage)
        raw = Store("redis://nemesis", namespace="nemesis", client=Direct(network.server))
        ledger = Ledger(raw, Keys("nemesis"), cluster.settings.ledger)
        simulation.run(lambda: storm.dead, 2 * STORM_S)
        _calm(cluster, network)
        began = simulation.now
        simulation.run(lambda: all(_ended(ledger, job) for job in jobs), CALM_S)
        found = [each for job in jobs for each in violations(ledger, job, cluster.losses[job.id])]
        calm_s, allowed_s = simulation.now - began, SWEEPS * SWEEP_S + sum(j.work_s for j in jobs)
        if calm_s > allowed_s:
            found.append(
                f"the jobs ended {calm_s:.0f} s after the storm, not within {allowed_s:.0f}"
            )
        states = [ledger.facts(job.id).get("state", "unknown") for job in jobs]
    return Outcome(
        seed=seed,
        violations=found,
        trace=simulation.trace,
        faults=network.plan.happened,
        drawn=network.plan.drawn,
        calls=network.calls,
        calm_s=calm_s,
        states=states,
    )


def _calm(cluster: Cluster, network: Network) -> None:
    """End the storm: Redis answers, and at least one healthy worker lives."""
    network.plan.calm, network.down = True, False
    network.server.refuse("")
    for worker in cluster.workers:
        for process in worker.processes():
            process.frozen_until = 0.0
    cluster.replace_dead_workers()
    cluster.simulation.note("the storm is over")


def _ended(ledger: Ledger, job: HistoryJob) -> bool:
    state = ledger.facts(job.id).get("state", "")
    return bool(state) and Status(state).final


@contextmanager
def _on_virtual_time(simulation: Simulation, random: Random) -> Iterator[None]:
    """Give the platform's code the time, the ids and the choices of a history."""
    known_operations()
    World.sleep = staticmethod(simulation.sleep)  # type: ignore[assignment]
    World.failed = {}
    ids, choices = Random(random.getrandbits(64)), Random(random.getrandbits(64))
    delay_s, before = RetryPolicy.delay_s, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with ExitStack() as stack:
        stack.enter_context(fakeredis_on(simulation.server_time))
        for target, value in {
            "secrets.token_hex": lambda n=32: ids.getrandbits(8 * n).to_bytes(n, "big").hex(),
            "rlm_tasks.engine.guards.Random": lambda: choices,
            "resilience.retry.RetryPolicy.delay_s": lambda policy, failures, _: delay_s(
                policy, failures, choices
            ),
            "rlm_tasks.engine.shared_page.ENTRIES": 64,  # the supervisor reads each of them
            "rlm_tasks.ledger.reader.ServerClock": partial(
                ServerClock, wall=simulation.machine_time
            ),
            "rlm_tasks.engine.node.os": _Os(simulation),
        }.items():
            stack.enter_context(patch(target, value))
        try:
            yield
        finally:
            logging.disable(before)


class _Os:
    """The part of `os` that a node uses: each process of a history has its own id."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def getpid(self) -> int:
        """Return the id of the process that runs."""
        assert self._simulation.current is not None
        return self._simulation.current.pid
