"""Guards that several processes share on a real server.

The tests check the provider's view, the state after a kill, and each guard's answers while Redis is
away."""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import redis

from resilience import (
    BreakerConfig,
    Bulkhead,
    CircuitBreaker,
    CircuitOpen,
    FaultLog,
    Rate,
    RetryBudget,
    Store,
    Timeouts,
    TokenBucket,
    classify,
)
from resilience.store import Call
from rlm_tasks.testing import embedded
from tests.faults.guards import (
    LEAST_USE,
    NAMESPACE,
    TROUBLE,
    against_provider,
    children,
    decisions,
    fake_provider,
    show,
)
from tests.faults.provider import report
from tests.support import wait_until

WINDOW_S = float(os.environ.get("GUARDS_WINDOW_S", "6"))
GUARD_S = 0.06 if WINDOW_S < 12 else None
"""One hundredth of a short window: two busy cores delay a request by more than the default 0.5 %.
"""


@pytest.fixture(scope="module")
def private_server() -> Iterator[embedded.Server]:
    """A server without the keys of other tests."""
    with embedded.server() as server:
        yield server


@pytest.fixture
def store(private_server: embedded.Server) -> Iterator[Store]:
    """An empty store, with a timeout that a busy machine does not exceed."""
    with redis.Redis.from_url(private_server.url) as client:
        client.flushall()
    found = Store(private_server.url, namespace=NAMESPACE)
    yield found
    found.client.close()


def as_json(config: BreakerConfig) -> str:
    """Return a configuration as an argument of a process."""
    return json.dumps(config.model_dump())


# --- the provider's view ----------------------------------------------------------------------


@pytest.mark.timeout(60 + 8 * WINDOW_S)
def test_eight_processes_use_up_a_providers_limit_and_never_exceed_it(
    private_server: embedded.Server,
) -> None:
    use = against_provider(private_server.url, WINDOW_S, "tokens", GUARD_S)
    show([use])

    assert use.refused == 0, "no 429"
    assert use.used["tokens"] >= LEAST_USE
    assert max(use.most.values()) <= 1, "no window has more than its limit, by the server's time"


def test_a_half_open_breaker_limits_probes_and_then_closes(
    private_server: embedded.Server, store: Store
) -> None:
    config = BreakerConfig(
        recovery_timeout_s=0.4, half_open_max_calls=3, half_open_timeout_s=5, success_threshold=20
    )
    breaker = CircuitBreaker("dependency", store, config)
    breaker.open()
    with (
        fake_provider("--failing", 8) as port,
        children(8, "probe", private_server.url, port, as_json(config)) as callers,
    ):
        wait_until(lambda: breaker.state == "closed")
        wait_until(lambda: any(kind == "free" for kind, _, _ in report(port)["calls"]))
        for each in callers:
            each.send("stop")
        for each in callers:
            each.receive("done")
        calls = report(port)["calls"]

    at_once = Counter(in_flight for kind, in_flight, _ in calls if kind == "probe")
    print(f"probes by the number in flight: {dict(sorted(at_once.items()))}")
    assert max(at_once) == config.half_open_max_calls, "all permits are used, and never more"
    assert at_once.total() >= 8 + config.success_threshold
    assert min(well for kind, _, well in calls if kind == "free") >= config.success_threshold, (
        "no other call passes before the probes have succeeded"
    )


def test_other_processes_see_a_trip_within_300_ms(
    private_server: embedded.Server, store: Store
) -> None:
    config, random, took = BreakerConfig(recovery_timeout_s=60, failure_threshold=3), Random(1), []
    breaker = CircuitBreaker("tripped", store, config)
    with (
        children(5, "observe", private_server.url, as_json(config)) as others,
        children(1, "trip", private_server.url, as_json(config)) as [tripper],
    ):
        for each in others:
            each.receive("passes")
        for _ in range(12):
            time.sleep(random.uniform(0, 0.25))  # a trip may come at any time after a read
            tripper.send("trip")
            [at] = tripper.receive("tripped")
            took.append(max(float(each.receive("refused")[0]) for each in others) - float(at))
            breaker.reset()
            for each in others:
                each.receive("passes")

    median, slowest = statistics.median(took), max(took)
    print(
        f"12 trips, until the last of 5 processes saw them: median {median * 1000:.0f} ms,"
        f" max {slowest * 1000:.0f} ms"
    )
    assert median <= 0.3
    assert slowest <= 1.0


# --- a slow process, and a silent server ------------------------------------------------------

SILENCE_S = 2.0
"""The silence of Redis after which a limit decides alone, by default."""


def alone(of: list[str]) -> dict[str, int]:
    """Return the decisions without Redis of a process that has ended, by kind of guard."""
    found: dict[str, int] = json.loads(of[1])
    return found


def test_eight_busy_processes_make_no_decision_without_redis(
    private_server: embedded.Server, store: Store
) -> None:
    made, alone = decisions(private_server.url, 640)

    assert (made, alone) == (640, {})


def test_a_process_that_was_stopped_does_not_take_redis_for_dead(
    private_server: embedded.Server, store: Store
) -> None:
    with children(2, "decide", private_server.url, 10**9, 0) as stopped:
        for each in stopped:
            each.receive("decides")
        for each in stopped:
            each.process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # the time for which they are stopped
        for each in stopped:
            each.process.send_signal(signal.SIGCONT)
        for each in stopped:
            each.send("stop")
        found = [each.receive("done") for each in stopped]

    assert [alone(each) for each in found] == [{}] * 2


def test_no_guard_decides_alone_while_redis_is_busy_for_a_second(
    private_server: embedded.Server, store: Store
) -> None:
    with children(2, "decide", private_server.url, 10**9, 0) as waiting:
        for each in waiting:
            each.receive("decides")
        with stopped_for(private_server, 1.0):
            pass
        for each in waiting:
            each.send("stop")
        found = [each.receive("done") for each in waiting]

    assert [alone(each) for each in found] == [{}] * 2
    assert store.alone()[0] == {}


def test_no_guard_decides_alone_because_its_connection_was_reset(
    private_server: embedded.Server, store: Store
) -> None:
    with (
        children(2, "decide", private_server.url, 10**9, 0) as calling,
        redis.Redis.from_url(private_server.url) as client,
    ):
        for each in calling:
            each.receive("decides")
        for _ in range(40):
            client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(0.05)  # the time between two resets
        for each in calling:
            each.send("stop")
        found = [each.receive("done") for each in calling]

    assert [alone(each) for each in found] == [{}] * 2
    assert Bulkhead("calls", store, limit=10**6).status()["used"] == 0, "no permit was lost"


def test_a_silent_redis_is_decided_without_in_time_and_the_decisions_are_counted(
    private_server: embedded.Server, store: Store
) -> None:
    with children(1, "decide", private_server.url, 10**9, 0.001) as [alone_then]:
        alone_then.receive("decides")
        with stopped_for(private_server, SILENCE_S + 1.5):
            pass
        wait_until(lambda: bool(store.alone()[0]))
        alone_then.send("stop")
        found = alone(alone_then.receive("done"))

    assert set(found) == {"breaker", "bucket", "bulkhead", "retry_budget"}
    assert store.alone()[0] == found
    assert store.alone()[1] < 20


def test_each_guard_waits_for_a_silent_redis_once_and_for_two_seconds(
    private_server: embedded.Server,
) -> None:
    shared = Store.from_url(private_server.url, namespace=NAMESPACE)
    bucket = TokenBucket("timed", shared, calls=Rate(10**6))
    assert bucket.acquire()
    assert private_server.process is not None
    private_server.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert bucket.acquire(max_wait_s=1).at == 0, "decided here"
        first_s = time.monotonic() - began
        for _ in range(100):
            bucket.acquire()
        rest_s = time.monotonic() - began - first_s
    finally:
        private_server.process.send_signal(signal.SIGCONT)
        shared.close()

    assert SILENCE_S <= first_s <= SILENCE_S + 2, "the bound, and the time of a busy machine"
    assert rest_s < first_s


@contextmanager
def stopped_for(server: embedded.Server, seconds: float) -> Iterator[None]:
    """Stop a server for some time; it does not answer, and its connections stay."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
        time.sleep(seconds)  # the time for which it is silent
    finally:
        server.process.send_signal(signal.SIGCONT)


# --- after a kill -----------------------------------------------------------------------------


def test_the_permit_of_a_killed_probe_is_free_after_its_lease(
    private_server: embedded.Server, store: Store
) -> None:
    config = BreakerConfig(
        half_open_max_calls=1, half_open_timeout_s=2.0, success_threshold=1, recovery_timeout_s=60
    )
    breaker = CircuitBreaker("held", store, config)
    breaker.half_open()
    with children(1, "hold_probe", private_server.url, as_json(config)) as [holder]:
        began, permit = holder.receive("holds")
        holder.kill()
        assert permit
        with pytest.raises(CircuitOpen, match="half-open"):
            breaker.admit()
        wait_until(lambda: passes(breaker))

    took = time.monotonic() - float(began)
    assert config.half_open_timeout_s - 0.1 <= took <= config.half_open_timeout_s + 1.0
    assert breaker.state == "closed", "the next probe has closed it"


def passes(breaker: CircuitBreaker) -> bool:
    """Return whether a breaker allows a call now; the call succeeds."""
    with suppress(CircuitOpen):
        breaker.call(lambda: None)
        return True
    return False


def test_permits_of_a_killed_process_are_free_after_their_lease(
    private_server: embedded.Server, store: Store
) -> None:
    bulkhead = Bulkhead("held", store, limit=3, per_host=None, lease_s=2.0)
    with children(1, "hold_permits", private_server.url, 3, 2.0) as [holder]:
        began, count, _ = holder.receive("holds")
        holder.kill()
        assert int(count) == 3
        assert not bulkhead.acquire(), "no other caller gets a permit"
        assert bulkhead.acquire(max_wait_s=10)

    assert 1.9 <= time.monotonic() - float(began) <= 3.0
    # The other two were taken a moment after the first, so they expire later.
    wait_until(lambda: bulkhead.status()["used"] == 1)


def test_forget_frees_the_permits_of_a_killed_process_at_once(
    private_server: embedded.Server, store: Store
) -> None:
    bulkhead = Bulkhead("held", store, limit=3, per_host=None, lease_s=60.0)
    with children(1, "hold_permits", private_server.url, 3, 60.0) as [holder]:
        _, _, owner = holder.receive("holds")
        holder.kill()
        assert not bulkhead.acquire()

    assert bulkhead.forget(owner) == 3
    assert bulkhead.forget(owner) == 0
    assert [bool(bulkhead.acquire()) for _ in range(4)] == [True, True, True, False]


# --- the answers of each guard while Redis is away --------------------------------------------

CALLS, OVER_S, LEARNED_S = 50, 2.0, 400.0


class CountingStore(Store):
    """A store that counts its requests to Redis, and whose clock can be set forward."""

    requests, ahead_s = 0, 0.0

    def __init__(self, url: str) -> None:
        super().__init__(
            url, namespace=NAMESPACE, timeout_s=0.1, clock=lambda: time.monotonic() + self.ahead_s
        )

    def _run(self, *calls: Call) -> list[Any]:
        """Count the request, and run the calls."""
        self.requests += 1
        return super()._run(*calls)


class Guard:
    """One guard of one process, with its uses before, during and after an outage of Redis."""

    def __init__(self, store: CountingStore, other: Store) -> None:
        self.store, self.other = store, other

    def before(self) -> None:
        """Use it before the outage."""

    def answer(self, number: int) -> Any:
        """Use it during the outage; return its answer."""
        raise NotImplementedError

    def check(self, answers: list[Any], took_s: float) -> None:
        """Assert that the answers of the outage, which took `took_s`, are those promised."""
        raise NotImplementedError

    def shared(self) -> bool:
        """Use it after the outage; return whether other processes see that use."""
        raise NotImplementedError


class ClosedBreaker(Guard):
    """A closed breaker: calls pass; a failing service opens it, in this process only."""

    def before(self) -> None:
        """Make a call, so that it stays closed."""
        config = BreakerConfig(failure_threshold=5, recovery_timeout_s=60)
        self.breaker, self.others = (
            CircuitBreaker("closed", store, config) for store in (self.store, self.other)
        )
        self.breaker.call(lambda: None)

    def answer(self, number: int) -> str:
        """Call a service that succeeds in the first half and fails in the second."""
        try:
            return self.breaker.call(self._service, number)
        except CircuitOpen:
            return "refused"
        except ConnectionError:
            return "failed"

    def _service(self, number: int) -> str:
        if number >= CALLS // 2:
            raise TROUBLE
        return "well"

    def check(self, answers: list[Any], took_s: float) -> None:
        """Calls pass by the last snapshot, then five failures open the local breaker."""
        assert answers == ["well"] * 25 + ["failed"] * 5 + ["refused"] * 20

    def shared(self) -> bool:
        """Fail a call, which other processes count."""
        self.answer(CALLS)
        return self.others.failure_count > 0


class OpenBreaker(Guard):
    """An open breaker: it stays open until its recovery time is over."""

    def before(self) -> None:
        """Open it, from another process."""
        config = BreakerConfig(recovery_timeout_s=60)
        self.breaker, self.others = (
            CircuitBreaker("open", store, config) for store in (self.store, self.other)
        )
        self.others.open()
        assert self.breaker.state == "open"

    def answer(self, number: int) -> float:
        """Make a call; return the retry time in seconds, 0 if the call passed."""
        try:
            self.breaker.call(lambda: None)
        except CircuitOpen as refused:
            return refused.retry_after_s
        return 0.0

    def check(self, answers: list[Any], took_s: float) -> None:
        """All calls are refused, with the remaining time."""
        assert answers == sorted(answers, reverse=True)
        assert 60 > answers[0] > answers[-1] > 60 - took_s - 5

    def shared(self) -> bool:
        """Make a call after another process has closed the breaker."""
        if self.others.state == "open":
            self.others.reset()
        return self.answer(0) == 0.0


class Bucket(Guard):
    """A token bucket: it grants half of the rate, since two processes have taken from it lately."""

    def before(self) -> None:
        """Take from it, and let another process take from it, too."""
        self.bucket, self.others = (
            TokenBucket("llm", store, calls=Rate(20)) for store in (self.store, self.other)
        )
        assert self.others.acquire()
        assert self.bucket.acquire()
        assert self.bucket.takers == 2

    def answer(self, number: int) -> bool:
        """Take a token."""
        return bool(self.bucket.acquire())

    def check(self, answers: list[Any], took_s: float) -> None:
        """It grants nearly all of its share of the rate; the bucket is empty at first."""
        assert 0.6 * 10 * OVER_S <= sum(answers) <= 10 * took_s + 1

    def shared(self) -> bool:
        """Take a token; a grant from Redis has the server's time."""
        return self.bucket.acquire().at > 0


class Permits(Guard):
    """A bulkhead: it allows as many permits as it held when Redis was lost."""

    def before(self) -> None:
        """Hold two permits of ten."""
        self.bulkhead, self.others = (
            Bulkhead("held", store, limit=10, lease_s=3.0) for store in (self.store, self.other)
        )
        self.held = [self.bulkhead.acquire(), self.bulkhead.acquire()]
        assert all(self.held)

    def answer(self, number: int) -> bool:
        """Request a third permit; in the second half, after one of the two was released."""
        if number == CALLS // 2:
            self.held.pop().release()
        permit = self.bulkhead.acquire()
        granted = bool(permit)
        permit.release()
        return granted

    def check(self, answers: list[Any], took_s: float) -> None:
        """At most two permits are held at once."""
        assert answers == [False] * 25 + [True] * 25

    def shared(self) -> bool:
        """Take a permit, which other processes see.

        The permit that was released during the outage is free after its lease."""
        with self.bulkhead.permit() as permit:
            if permit.local:
                return False
            wait_until(lambda: self.others.status()["used"] == 1)
        return self.others.status()["used"] == 0


class Budget(Guard):
    """A retry budget: it always allows three retries a second."""

    def before(self) -> None:
        """Spend a retry."""
        self.budget = RetryBudget("llm", self.store)
        assert self.budget.spend()

    def answer(self, number: int) -> bool:
        """Spend a retry."""
        return self.budget.spend()

    def check(self, answers: list[Any], took_s: float) -> None:
        """It allows three a second; the balance is 0 at first."""
        assert 0.6 * 3 * OVER_S <= sum(answers) <= 3 * took_s + 1

    def shared(self) -> bool:
        """Spend a retry from the shared balance."""
        key = f"{NAMESPACE}:{{budget:llm}}"
        before = self.other.client.hget(key, "at")
        self.budget.spend()
        return self.other.client.hget(key, "at") != before


class Limits(Guard):
    """Timeouts: the limit that was read last, or the base table."""

    taught = False

    def before(self) -> None:
        """Read the learned limit of one operation; then set the clock forward to make it old."""
        self.timeouts, self.others = Timeouts(self.store), Timeouts(self.other)
        self.others.learn("known", [LEARNED_S] * 100)
        self.known_s = self.timeouts.limit_s("known", "simple")
        assert 1.5 * LEARNED_S <= self.known_s <= 1.7 * LEARNED_S
        self.store.ahead_s = 31.0

    def answer(self, number: int) -> tuple[float, float]:
        """Return the limits of this operation, and of one that was never run."""
        return self.timeouts.limit_s("known", "simple"), self.timeouts.limit_s("new", "simple")

    def check(self, answers: list[Any], took_s: float) -> None:
        """The answers are always the same."""
        assert set(answers) == {(self.known_s, 300.0)}

    def shared(self) -> bool:
        """Read the limit of an operation that another process has learned since."""
        if not self.taught:
            self.others.learn("new", [LEARNED_S] * 100)
            self.taught = True
        return self.timeouts.limit_s("new", "simple") == self.known_s


class Faults(Guard):
    """A fault log: it keeps nothing, and raises nothing."""

    def before(self) -> None:
        """Record a fault."""
        self.log, self.others = FaultLog(self.store), FaultLog(self.other)
        self.log.record("llm", [(classify(TROUBLE), "before")])

    def answer(self, number: int) -> None:
        """Record a fault."""
        return self.log.record("llm", [(classify(TROUBLE), "meanwhile")])

    def check(self, answers: list[Any], took_s: float) -> None:
        """Every answer is None."""
        assert set(answers) == {None}

    def shared(self) -> bool:
        """Record a fault, which other processes see."""
        self.log.record("llm", [(classify(TROUBLE), "after")])
        return "after" in {each.message for each in self.others.patterns()}


GUARDS: dict[str, type[Guard]] = {
    "closed breaker": ClosedBreaker,
    "open breaker": OpenBreaker,
    "bucket": Bucket,
    "bulkhead": Permits,
    "retry budget": Budget,
    "timeouts": Limits,
    "fault log": Faults,
}


@dataclass
class GuardRun:
    """One guard, and its measurements during an outage."""

    guard: Guard
    took: list[float] = field(default_factory=list)  # seconds of each call during the outage
    answers: list[Any] = field(default_factory=list)
    requests: int = 0  # to Redis, during the outage
    over_s: float = 0.0
    back_s: float = -1.0  # from the return of Redis until state was shared again; -1: never
    logged: list[str] = field(default_factory=list)  # all messages

    def while_away(self) -> None:
        """Use it 50 times in two seconds."""
        requests, began = self.guard.store.requests, time.monotonic()
        for number in range(CALLS):
            # The sleep sets the rate of the calls.
            time.sleep(max(0.0, began + number * OVER_S / CALLS - time.monotonic()))
            at = time.monotonic()
            self.answers.append(self.guard.answer(number))
            self.took.append(time.monotonic() - at)
        self.requests = self.guard.store.requests - requests
        self.over_s = time.monotonic() - began

    def after(self) -> None:
        """Use it until state is shared again."""
        began = time.monotonic()
        wait_until(self.guard.shared)
        self.back_s = time.monotonic() - began


class LogRecorder(logging.Handler):
    """Keeps the messages of each thread; pytest's caplog ends with a test, before the fixture."""

    def __init__(self, runs: dict[str, GuardRun]) -> None:
        super().__init__(logging.WARNING)
        self._runs = runs

    def emit(self, record: logging.LogRecord) -> None:
        """Add a message to the run of the guard that has the thread's name."""
        if record.threadName in self._runs:
            self._runs[record.threadName].logged.append(record.getMessage())


def at_once(runs: dict[str, GuardRun], step: Callable[[GuardRun], None]) -> None:
    """Do a step for every guard at once, each in a thread of its name.

    Raises the first error that a step raises."""
    raised: list[BaseException] = []

    def run(each: GuardRun) -> None:
        try:
            step(each)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(each,), name=name) for name, each in runs.items()]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for error in raised:
        raise error


def killed(server: embedded.Server, use: Callable[[], None]) -> None:
    """Kill the server, use the guards, and start it again from its append-only file."""
    server.stop(kill=True)
    use()
    server.start()


def paused(server: embedded.Server, use: Callable[[], None]) -> None:
    """Pause the server for a little longer than the guards are used."""
    with redis.Redis.from_url(server.url) as client:
        client.client_pause(int((OVER_S + 0.7) * 1000))
        use()
        client.ping()  # the answer comes when the pause is over


@pytest.fixture(scope="module", params=[killed, paused], ids=["redis killed", "redis paused"])
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, GuardRun]]:
    """All guards during one outage, at the same time; each has a private store, as in a process."""
    with embedded.server(durable=True) as server:
        other = Store(server.url, namespace=NAMESPACE)
        found = {
            name: GuardRun(guard(CountingStore(server.url), other))
            for name, guard in GUARDS.items()
        }
        recorder = LogRecorder(found)
        logging.getLogger("resilience").addHandler(recorder)
        try:
            at_once(found, lambda run: run.guard.before())
            request.param(server, lambda: at_once(found, GuardRun.while_away))
            at_once(found, GuardRun.after)
        finally:
            logging.getLogger("resilience").removeHandler(recorder)
            for each in (other, *(run.guard.store for run in found.values())):
                each.client.close()
        yield found


each_guard = pytest.mark.parametrize("name", GUARDS)


@each_guard
def test_a_guard_gives_the_stated_answer_while_redis_is_away(
    runs: dict[str, GuardRun], name: str
) -> None:
    run = runs[name]
    run.guard.check(run.answers, run.over_s)


@each_guard
def test_a_guard_without_redis_answers_within_100_ms(runs: dict[str, GuardRun], name: str) -> None:
    run = runs[name]
    median = statistics.median(run.took)
    print(
        f"{name}: median {median * 1000:.2f} ms, max {max(run.took) * 1000:.0f} ms,"
        f" {run.requests} requests"
    )

    assert len(run.took) == CALLS
    assert median <= 0.1
    assert 2 <= run.requests <= 4, "it tries Redis again about once a second"


@each_guard
def test_a_lost_redis_and_its_return_are_logged_once(runs: dict[str, GuardRun], name: str) -> None:
    about = [each for each in runs[name].logged if each.startswith("Redis at")]

    assert len(about) == 2, about
    assert "does not answer" in about[0]
    assert "answers again" in about[1]


@each_guard
def test_a_guard_shares_its_state_again_once_redis_is_back(
    runs: dict[str, GuardRun], name: str
) -> None:
    print(f"{name}: shared again after {runs[name].back_s:.2f} s")
    assert 0 <= runs[name].back_s <= 5.0
