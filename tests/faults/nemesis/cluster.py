"""The processes of a history: workers with their supervisors and pools, a broker, and a client.

They run the platform's own code: the handlers of messages, the engine, the ledger, the supervisor.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from queue import Empty
from random import Random
from types import SimpleNamespace
from typing import Any

import redis

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks.engine.message_handlers import handle_merge, handle_node
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import ItemReader, ItemWriter
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import ROOT, Child, Split
from rlm_tasks.messaging.dispatch import new_id
from rlm_tasks.operations import registry
from rlm_tasks.settings.model import Settings
from rlm_tasks.worker.supervisor import Supervisor
from tests.faults.nemesis.jobs import HistoryJob, World
from tests.faults.nemesis.network import Network, Wire
from tests.faults.nemesis.simulation import Process, Simulation

LEASE_S, SWEEP_S, TIMEOUT_S, GUARD_TIMEOUT_S = 6.0, 1.0, 1.0, 0.1
SLOTS = 2
QUEUE = "nemesis.normal"


class Request(dict[str, Any]):
    """A task's request, as far as the handlers read it."""

    def __getattr__(self, name: str) -> Any:
        """Return a field."""
        return self.get(name)


class Broker:
    """A queue that loses, doubles and reorders messages; it has the methods of the dispatcher."""

    def __init__(self, network: Network) -> None:
        self._network, self._simulation = network, network.simulation
        self.waiting: deque[tuple[str, str, int]] = (
            deque()
        )  # job, node or split, number (-1: merge)
        self.idle: list[Process] = []

    def post(self, job: str, node: str, number: int) -> None:
        """Put a message into the queue."""
        self.waiting.append((job, node, number))
        if self.idle:
            self._simulation.wake(self.idle.pop(0), 0.001)

    def take(self) -> tuple[str, str, int]:
        """Return the next message; wait for one."""
        while not self.waiting:
            process = self._simulation.current
            assert process is not None
            self.idle.append(process)
            self._simulation.sleep(5.0)
            self.idle = [each for each in self.idle if each is not process]
        return self.waiting.popleft()

    def _publish(self, messages: Sequence[tuple[str, str, int]]) -> None:
        """Send messages as the dispatcher does: a message that is not sent is the sweep's."""
        plan = self._network.plan
        for job, node, number in messages:
            if self._network.down:
                return
            hurt = not plan.calm and plan.random.random() < plan.rate and plan.next()
            copies = plan.random.choice([0, 0, 2]) if hurt else 1
            if copies != 1:
                self._simulation.note(f"fault {plan.drawn}: {copies} messages of {node}")
            for _ in range(copies):
                self.post(job, node, number)
            self._simulation.sleep(0.0002)

    def send_root(self, some: Sequence[JobSpec], node: str) -> None:
        """Send the first node of each job."""
        self._publish([(spec.job, node, 0) for spec in some])

    def send_children(
        self, spec: JobSpec, children: Sequence[Child], splits: Sequence[Split], *, merges: bool
    ) -> None:
        """Send children; the bodies of their chords come at any time."""
        for split in splits if merges else ():
            self.post(spec.job, split.id, -1)
        self._publish([(spec.job, each.id, 0) for each in children if each.wait_ms < 0])

    def resend(self, spec: JobSpec, nodes: Sequence[str], *, merges: bool) -> None:
        """Send registered nodes again."""
        self._publish(
            [(spec.job, each.id, each.message) for each in self.ledger.records(spec.job, nodes)]
        )

    def ask_to_yield(self, queue: str) -> None:
        """Do nothing: no job of a history is urgent."""

    def of(self, ledger: Ledger) -> Broker:
        """Return the broker for the process of a ledger."""
        mine = Broker(self._network)
        mine.waiting, mine.idle, mine.ledger = self.waiting, self.idle, ledger
        mine.post = self.post  # type: ignore[method-assign]
        return mine

    ledger: Ledger


class _Wakeups:
    """The supervisor's queue of wake-ups, which nobody sends: it sleeps in virtual time."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def get(self, timeout: float) -> None:
        """Sleep."""
        self._simulation.sleep(max(0.05, timeout))
        raise Empty

    def get_nowait(self) -> None:
        """Return nothing."""
        raise Empty

    def put(self, _: None) -> None:
        """Do nothing."""


class Worker:
    """A worker: its supervisor, and the processes of its pool."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._simulation, self.name = cluster, cluster.simulation, name
        self.busy: list[tuple[str, str, int]] = []
        self.pool: list[Process] = []
        self.runtime = cluster.runtime(name)
        supervisor = Supervisor(self.runtime, {}, lambda: SLOTS, lambda: [QUEUE])
        supervisor._wakeups = _Wakeups(self._simulation)  # type: ignore[assignment]
        supervisor._settings_checked = True
        supervisor._due |= dict.fromkeys(("measure", "exchange"), float("inf"))
        self.supervisor = self._simulation.start(f"{name} supervisor", supervisor.run, self)
        for _ in range(SLOTS):
            self.add_process()

    def add_process(self) -> None:
        """Start a process of the pool."""
        name = f"{self.name} pool {len(self.pool) + 1}"
        self.pool.append(self._simulation.start(name, self._serve, self))

    def _serve(self) -> None:
        cluster = self._cluster
        runtime = replace(self.runtime, items=ItemReader(self.runtime.ledger.store))
        while True:
            message = cluster.broker.take()
            cluster.holding[self._simulation.current] = message
            self.busy.append(message)
            World.run.name = f"run {len(self._simulation.trace)}"
            self._handle(runtime, *message)
            self.busy.remove(message)
            cluster.holding.pop(self._simulation.current)
            self._simulation.sleep(0.001)

    def _handle(self, runtime: Runtime, job: str, node: str, number: int) -> None:
        request = Request(rlm={"message": number}, delivery_info={})
        task = SimpleNamespace(request=request)
        self._simulation.note(f"takes the message of {node} of {job[:4]}")
        try:
            if number < 0:
                handle_merge(runtime, task, job, node)
            else:
                handle_node(runtime, task, job, node)
        except Exception as error:  # Celery logs it, and the process goes on
            self._simulation.note(f"the task raises {type(error).__name__}: {error}")

    def processes(self) -> list[Process]:
        """Return all processes of this worker that live."""
        return [each for each in (self.supervisor, *self.pool) if not each.dead]

    def kill_process(self, process: Process) -> None:
        """Kill a process of the pool; the worker gives its message back and replaces it."""
        self._cluster.note_losses(self, {process.pid})
        process.dead = True
        self._cluster.redeliver(process)
        self._simulation.start("respawn", self._respawn, self)

    def _respawn(self) -> None:
        self._simulation.sleep(1.0)
        if not self.supervisor.dead:
            self.add_process()

    def kill(self) -> None:
        """Kill the whole worker; its messages come again much later, or never."""
        self._cluster.note_losses(self, {each.pid for each in self.pool})
        for process in self.processes():
            process.dead = True


class Cluster:
    """Two workers, a broker, and the client that submits the jobs."""

    def __init__(self, network: Network, random: Random) -> None:
        self.network, self.simulation, self.random = network, network.simulation, random
        self.settings = Settings.model_validate(
            {
                "namespace": "nemesis",
                "ledger": {"lease_s": LEASE_S, "sweep_s": SWEEP_S, "grace_s": None},
            }
        )
        self.keys = Keys("nemesis")
        self.holding: dict[Process | None, tuple[str, str, int]] = {}
        self.losses = Counter[str]()
        self.broker = Broker(network)
        self.workers = [Worker(self, f"w{number}") for number in (1, 2)]
        network.kill = self._kill_caller

    def store(self, timeout_s: float, patience_s: float = 0.0) -> Store:
        """Return the store of a process."""
        return Store(
            "redis://nemesis",
            namespace="nemesis",
            client=Wire(self.network, timeout_s),
            clock=self.simulation.monotonic,
            random=Random(self.random.getrandbits(32)),
            patience_s=patience_s,
            sleep=self.simulation.sleep,
        )

    def runtime(self, name: str) -> Runtime:
        """Return the runtime of a worker."""
        store = self.store(TIMEOUT_S, LEASE_S)
        ledger = Ledger(store, self.keys, self.settings.ledger, on_outage="wait")
        runtime = Runtime.build(
            self.settings,
            ledger,
            self.broker.of(ledger),  # type: ignore[arg-type]  # has the methods of the dispatcher
            shared=self.store(GUARD_TIMEOUT_S),
            clock=self.simulation.monotonic,
        )
        runtime.worker = name
        return runtime

    # --- the client ----------------------------------------------------------------------------

    def submit_until_known(self, job: HistoryJob, over: Callable[[], bool]) -> None:
        """Submit a job, and submit it again after Redis has lost it; cancel it at its time."""
        ledger = Ledger(self.store(TIMEOUT_S), self.keys, self.settings.ledger)
        broker = self.broker.of(ledger)
        while not over():
            try:
                if not ledger.facts(job.id):
                    self._open(ledger, broker, job)
                if job.cancel_at_s is not None and self.simulation.now >= job.cancel_at_s:
                    job.cancelled = True
                    ledger.stop(job.id, "cancelled")
                    job.cancel_at_s = None
            except (StoreUnavailable, redis.RedisError) as error:
                self.simulation.note(f"the client meets {type(error).__name__}")
                self.simulation.sleep(0.5)
                continue
            self.simulation.sleep(4.0)

    def _open(self, ledger: Ledger, broker: Broker, job: HistoryJob) -> None:
        token, options = new_id(), job.request.options
        ttl_s = self.settings.result_ttl_s
        index, blocks = self.keys.staged(job.id, token)
        writer = ItemWriter(ledger.store, index, blocks, max_item_bytes=1 << 20)
        source, n = ledger.store.call(lambda _: source_of(job.items).write(writer))
        spec = JobSpec(
            job=job.id,
            operation=job.operation,
            source=source,
            n=n,
            shape=job.request.shape(1000.0),
            queue=QUEUE,
            kind=job.request.kind,
            continue_on_error=options.continue_on_error,
            skip_if_empty=job.request.conditions.skip_if_empty,
            timeout_ms=options.timeout_ms,
        )
        ledger.open([(spec, token)], ttl_s)
        broker.send_root([spec], ROOT)

    # --- deaths --------------------------------------------------------------------------------

    def note_losses(self, worker: Worker, pids: Collection[int]) -> None:
        """Count for each job the processes that die, or are frozen, while they hold its nodes."""
        held = [each.job for each in worker.runtime.page.held() if each.pid in pids]
        self.losses.update(held)

    def cause_of_death(self, pid: int) -> str:
        """Return the signal by which a process of a pool died, '' while it lives."""
        dead = {each.pid for worker in self.workers for each in worker.pool if each.dead}
        return "SIGKILL" if pid in dead else ""

    def redeliver(self, process: Process | None) -> None:
        """Put the message of a dead process back into the queue."""
        if message := self.holding.pop(process, None):
            self.broker.post(*message)

    def _kill_caller(self) -> bool:
        """Kill the process that runs, if it is one of a pool; it does not return."""
        process = self.simulation.current
        for worker in self.workers:
            if process in worker.pool and process is not None:
                worker.kill_process(process)
                self.simulation.sleep(0)
        return False

    def replace_dead_workers(self) -> None:
        """Start a new worker for each dead one, and wake those that are frozen."""
        for worker in list(self.workers):
            if worker.supervisor.dead:
                self.workers.append(Worker(self, f"w{len(self.workers) + 1}"))
                for process in worker.pool:
                    if self.random.random() < 0.5:
                        self.redeliver(process)
                    self.holding.pop(process, None)


def known_operations() -> None:
    """Register the built-in operations."""
    registry.import_operations(())
