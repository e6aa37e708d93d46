"""Guards that several processes share on a real server: what a provider sees of them, what a kill
leaves, what each answers while Redis is away."""

from __future__ import annotations

import json
import logging
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
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
    fake_provider,
    show,
)
from tests.faults.provider import report
from tests.support import wait_until

WINDOW_S = float(os.environ.get("GUARDS_WINDOW_S", "6"))
GUARD_S = 0.06 if WINDOW_S < 12 else None
"""One hundredth of a short window, because two busy cores delay a request by more than the 0.5 %
that is left by default.
"""


@pytest.fixture(scope="module")
def own() -> Iterator[embedded.Server]:
    """A server without the keys of others."""
    with embedded.server() as server:
        yield server


@pytest.fixture
def store(own: embedded.Server) -> Iterator[Store]:
    """An empty store, with a timeout that a busy machine does not exceed."""
    with redis.Redis.from_url(own.url) as client:
        client.flushall()
    found = Store(own.url, namespace=NAMESPACE)
    yield found
    found.client.close()


def told(config: BreakerConfig) -> str:
    """Return a configuration as a process is told it."""
    return json.dumps(config.model_dump())


# --- what a provider sees ---------------------------------------------------------------------


@pytest.mark.timeout(60 + 8 * WINDOW_S)
def test_eight_processes_use_a_provider_up_and_never_too_much(own: embedded.Server) -> None:
    use = against_provider(own.url, WINDOW_S, "tokens", GUARD_S)
    show([use])

    assert use.refused == 0, "no 429"
    assert use.used["tokens"] >= LEAST_USE
    assert max(use.most.values()) <= 1, "no window has more than its limit, by the server's time"


def test_a_half_open_breaker_lets_no_more_probes_pass_than_it_may_and_closes(
    own: embedded.Server, store: Store
) -> None:
    config = BreakerConfig(
        recovery_timeout_s=0.4, half_open_max_calls=3, half_open_timeout_s=5, success_threshold=20
    )
    breaker = CircuitBreaker("dependency", store, config)
    breaker.open()
    with (
        fake_provider("--failing", 8) as port,
        children(8, "probe", own.url, port, told(config)) as callers,
    ):
        wait_until(lambda: breaker.state == "closed")
        wait_until(lambda: any(what == "free" for what, _, _ in report(port)["calls"]))
        for each in callers:
            each.say("stop")
        for each in callers:
            each.hear("done")
        calls = report(port)["calls"]

    at_once = Counter(in_flight for what, in_flight, _ in calls if what == "probe")
    print(f"probes by how many were in flight: {dict(sorted(at_once.items()))}")
    assert max(at_once) == config.half_open_max_calls, "all places are used, and no other"
    assert at_once.total() >= 8 + config.success_threshold
    assert min(well for what, _, well in calls if what == "free") >= config.success_threshold, (
        "nobody passes the probes by"
    )


def test_a_trip_is_seen_by_other_processes_within_300_ms(
    own: embedded.Server, store: Store
) -> None:
    config, random, took = BreakerConfig(recovery_timeout_s=60, failure_threshold=3), Random(1), []
    breaker = CircuitBreaker("tripped", store, config)
    with (
        children(5, "observe", own.url, told(config)) as others,
        children(1, "trip", own.url, told(config)) as [tripper],
    ):
        for each in others:
            each.hear("passes")
        for _ in range(12):
            time.sleep(
                random.uniform(0, 0.25)
            )  # a trip comes at any time since the others have asked
            tripper.say("trip")
            [at] = tripper.hear("tripped")
            took.append(max(float(each.hear("refused")[0]) for each in others) - float(at))
            breaker.reset()
            for each in others:
                each.hear("passes")

    median, slowest = statistics.median(took), max(took)
    print(
        f"12 trips, until the last of 5 processes knew: median {median * 1000:.0f} ms, max {slowest * 1000:.0f} ms"
    )
    assert median <= 0.3
    assert slowest <= 1.0


# --- what a kill leaves -----------------------------------------------------------------------


def test_the_place_of_a_killed_probe_is_free_after_its_lease(
    own: embedded.Server, store: Store
) -> None:
    config = BreakerConfig(
        half_open_max_calls=1, half_open_timeout_s=2.0, success_threshold=1, recovery_timeout_s=60
    )
    breaker = CircuitBreaker("held", store, config)
    breaker.half_open()
    with children(1, "hold_probe", own.url, told(config)) as [holder]:
        began, permit = holder.hear("holds")
        holder.kill()
        assert permit
        with pytest.raises(CircuitOpen, match="half-open"):
            breaker.admit()
        wait_until(lambda: passes(breaker))

    took = time.monotonic() - float(began)
    assert config.half_open_timeout_s - 0.1 <= took <= config.half_open_timeout_s + 1.0
    assert breaker.state == "closed", "the probe that took its place has closed it"


def passes(breaker: CircuitBreaker) -> bool:
    """Say whether a call through a breaker is made now; it goes well."""
    with suppress(CircuitOpen):
        breaker.call(lambda: None)
        return True
    return False


def test_permits_of_a_killed_process_are_free_after_their_lease(
    own: embedded.Server, store: Store
) -> None:
    bulkhead = Bulkhead("held", store, limit=3, per_host=None, lease_s=2.0)
    with children(1, "hold_permits", own.url, 3, 2.0) as [holder]:
        began, count, _ = holder.hear("holds")
        holder.kill()
        assert int(count) == 3
        assert not bulkhead.acquire(), "nobody else gets one"
        assert bulkhead.acquire(max_wait_s=10)

    assert 1.9 <= time.monotonic() - float(began) <= 3.0
    wait_until(
        lambda: bulkhead.status()["used"] == 1
    )  # the others were taken, and expire, a moment after the first


def test_permits_of_a_killed_process_are_free_at_once_when_somebody_says_so(
    own: embedded.Server, store: Store
) -> None:
    bulkhead = Bulkhead("held", store, limit=3, per_host=None, lease_s=60.0)
    with children(1, "hold_permits", own.url, 3, 60.0) as [holder]:
        _, _, owner = holder.hear("holds")
        holder.kill()
        assert not bulkhead.acquire()

    assert bulkhead.forget(owner) == 3
    assert bulkhead.forget(owner) == 0
    assert [bool(bulkhead.acquire()) for _ in range(4)] == [True, True, True, False]


# --- what each guard answers while Redis is away ----------------------------------------------

CALLS, OVER_S, LEARNED_S = 50, 2.0, 7.0


class Counted(Store):
    """A guards' store that counts how often it really asks Redis, and whose clock can be put
    forward.
    """

    asked, ahead_s = 0, 0.0

    def __init__(self, url: str) -> None:
        super().__init__(
            url, namespace=NAMESPACE, timeout_s=0.1, clock=lambda: time.monotonic() + self.ahead_s
        )

    def _run(self, *calls: Call) -> list[Any]:
        """Count, and do as a store does."""
        self.asked += 1
        return super()._run(*calls)


class Guard:
    """One guard of one process: what is done to it before, while and after Redis is away."""

    def __init__(self, store: Counted, other: Store) -> None:
        self.store, self.other = store, other

    def before(self) -> None:
        """Use it while Redis is there."""

    def answer(self, number: int) -> Any:
        """Use it while Redis is away."""
        raise NotImplementedError

    def check(self, answers: list[Any], took_s: float) -> None:
        """Hold its answers against what is promised."""
        raise NotImplementedError

    def shared(self) -> bool:
        """Use it after Redis is back; say whether it has shared that with other processes."""
        raise NotImplementedError


class ClosedBreaker(Guard):
    """Calls pass, and a failing service opens it in this process alone."""

    def before(self) -> None:
        """Leave it closed."""
        config = BreakerConfig(failure_threshold=5, recovery_timeout_s=60)
        self.breaker, self.others = (
            CircuitBreaker("closed", store, config) for store in (self.store, self.other)
        )
        self.breaker.call(lambda: None)

    def answer(self, number: int) -> str:
        """Call a service that is well at first, and then is not."""
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
        """The last snapshot first, then a breaker of its own."""
        assert answers == ["well"] * 25 + ["failed"] * 5 + ["refused"] * 20

    def shared(self) -> bool:
        """Fail: others count it."""
        self.answer(CALLS)
        return self.others.failure_count > 0


class OpenBreaker(Guard):
    """It stays open until its time is over."""

    def before(self) -> None:
        """Open it, from another process."""
        config = BreakerConfig(recovery_timeout_s=60)
        self.breaker, self.others = (
            CircuitBreaker("open", store, config) for store in (self.store, self.other)
        )
        self.others.open()
        assert self.breaker.state == "open"

    def answer(self, number: int) -> float:
        """Call, and say how many seconds to wait: 0 when the call was made."""
        try:
            self.breaker.call(lambda: None)
        except CircuitOpen as refused:
            return refused.retry_after_s
        return 0.0

    def check(self, answers: list[Any], took_s: float) -> None:
        """All are refused, and told when it ends."""
        assert answers == sorted(answers, reverse=True)
        assert 60 > answers[0] > answers[-1] > 60 - took_s - 5

    def shared(self) -> bool:
        """Call: others have closed it."""
        if self.others.state == "open":
            self.others.reset()
        return self.answer(0) == 0.0


class Bucket(Guard):
    """Half of the rate, because two processes have taken from it lately."""

    def before(self) -> None:
        """Let another process take from it, too."""
        self.bucket, self.others = (
            TokenBucket("llm", store, calls=Rate(20)) for store in (self.store, self.other)
        )
        assert self.others.acquire()
        assert self.bucket.acquire()
        assert self.bucket.takers == 2

    def answer(self, number: int) -> bool:
        """Take."""
        return bool(self.bucket.acquire())

    def check(self, answers: list[Any], took_s: float) -> None:
        """Its share of the rate, from nothing, and nearly all of it."""
        assert 0.6 * 10 * OVER_S <= sum(answers) <= 10 * took_s + 1

    def shared(self) -> bool:
        """Take: the grant has a time of the server, and others see what was taken meanwhile."""
        return self.bucket.acquire().at > 0


class Permits(Guard):
    """As many as it held at the loss, and no more."""

    def before(self) -> None:
        """Hold two of ten."""
        self.bulkhead, self.others = (
            Bulkhead("held", store, limit=10, lease_s=3.0) for store in (self.store, self.other)
        )
        self.held = [self.bulkhead.acquire(), self.bulkhead.acquire()]
        assert all(self.held)

    def answer(self, number: int) -> bool:
        """Ask for a third; in the second half, after giving back one of the two."""
        if number == CALLS // 2:
            self.held.pop().release()
        permit = self.bulkhead.acquire()
        granted = bool(permit)
        permit.release()
        return granted

    def check(self, answers: list[Any], took_s: float) -> None:
        """None beyond two."""
        assert answers == [False] * 25 + [True] * 25

    def shared(self) -> bool:
        """Take: others see it, and what was given back meanwhile has only the length of its
        lease.
        """
        with self.bulkhead.permit() as permit:
            if permit.local:
                return False
            wait_until(lambda: self.others.status()["used"] == 1)
        return self.others.status()["used"] == 0


class Budget(Guard):
    """The retries that are always allowed: three a second."""

    def before(self) -> None:
        """Spend."""
        self.budget = RetryBudget("llm", self.store)
        assert self.budget.spend()

    def answer(self, number: int) -> bool:
        """Spend."""
        return self.budget.spend()

    def check(self, answers: list[Any], took_s: float) -> None:
        """The floor, from nothing."""
        assert 0.6 * 3 * OVER_S <= sum(answers) <= 3 * took_s + 1

    def shared(self) -> bool:
        """Spend: the balance of all is there again."""
        key = f"{NAMESPACE}:{{budget:llm}}"
        before = self.other.client.hget(key, "at")
        self.budget.spend()
        return self.other.client.hget(key, "at") != before


class Limits(Guard):
    """What was read last, or the base table."""

    taught = False

    def before(self) -> None:
        """Read the limit of one operation that all have learned; then let what was read grow
        old.
        """
        self.timeouts, self.others = Timeouts(self.store), Timeouts(self.other)
        self.others.learn("known", [LEARNED_S] * 100)
        self.known_s = self.timeouts.limit_s("known", "simple")
        assert self.known_s == pytest.approx(75), "not less than a quarter of the base"
        self.store.ahead_s = 31.0

    def answer(self, number: int) -> tuple[float, float]:
        """Ask for the limits of this operation, and of one that nobody has run."""
        return self.timeouts.limit_s("known", "simple"), self.timeouts.limit_s("new", "simple")

    def check(self, answers: list[Any], took_s: float) -> None:
        """Always the same."""
        assert set(answers) == {(self.known_s, 300.0)}

    def shared(self) -> bool:
        """Ask for the limit of an operation that others have learned meanwhile."""
        if not self.taught:
            self.others.learn("new", [LEARNED_S] * 100)
            self.taught = True
        return self.timeouts.limit_s("new", "simple") == self.known_s


class Faults(Guard):
    """Nothing is kept, and nothing is raised."""

    def before(self) -> None:
        """Record one."""
        self.log, self.others = FaultLog(self.store), FaultLog(self.other)
        self.log.record("llm", [(classify(TROUBLE), "before")])

    def answer(self, number: int) -> None:
        """Record one."""
        return self.log.record("llm", [(classify(TROUBLE), "meanwhile")])

    def check(self, answers: list[Any], took_s: float) -> None:
        """Nothing is returned."""
        assert set(answers) == {None}

    def shared(self) -> bool:
        """Record one: others see it."""
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
class Course:
    """What happened to one guard."""

    guard: Guard
    took: list[float] = field(default_factory=list)  # seconds of each call while Redis was away
    answers: list[Any] = field(default_factory=list)
    asked: int = 0  # how often it has asked Redis meanwhile
    over_s: float = 0.0
    back_s: float = -1.0  # from Redis' return until state was shared again; -1: never
    said: list[str] = field(default_factory=list)  # in the log, in all

    def while_away(self) -> None:
        """Use it 50 times in two seconds."""
        asked, began = self.guard.store.asked, time.monotonic()
        for number in range(CALLS):
            time.sleep(
                max(0.0, began + number * OVER_S / CALLS - time.monotonic())
            )  # the rate of the calls
            at = time.monotonic()
            self.answers.append(self.guard.answer(number))
            self.took.append(time.monotonic() - at)
        self.asked, self.over_s = self.guard.store.asked - asked, time.monotonic() - began

    def after(self) -> None:
        """Use it until state is shared again."""
        began = time.monotonic()
        wait_until(self.guard.shared)
        self.back_s = time.monotonic() - began


class Ears(logging.Handler):
    """Notes what each thread logs: caplog does not outlive a test."""

    def __init__(self, courses: dict[str, Course]) -> None:
        super().__init__(logging.WARNING)
        self._courses = courses

    def emit(self, record: logging.LogRecord) -> None:
        """Note it with the guard that the thread is named after."""
        if record.threadName in self._courses:
            self._courses[record.threadName].said.append(record.getMessage())


def at_once(courses: dict[str, Course], step: Callable[[Course], None]) -> None:
    """Do a step for every guard, each in a thread that is named after it; raise what one raises."""
    raised: list[BaseException] = []

    def run(course: Course) -> None:
        try:
            step(course)
        except BaseException as error:
            raised.append(error)

    threads = [
        threading.Thread(target=run, args=(course,), name=name) for name, course in courses.items()
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for error in raised:
        raise error


def killed(server: embedded.Server, use: Callable[[], None]) -> None:
    """Kill the server, and start it again on what its append-only file holds."""
    server.stop(kill=True)
    use()
    server.start()


def paused(server: embedded.Server, use: Callable[[], None]) -> None:
    """Let the server answer nobody, for a little longer than the guards are used."""
    with redis.Redis.from_url(server.url) as client:
        client.client_pause(int((OVER_S + 0.7) * 1000))
        use()
        client.ping()  # answered when the pause is over


@pytest.fixture(scope="module", params=[killed, paused], ids=["redis killed", "redis paused"])
def courses(request: pytest.FixtureRequest) -> Iterator[dict[str, Course]]:
    """All guards through one outage, side by side: each with a store of its own, as in a process of
    its own.
    """
    with embedded.server(durable=True) as server:
        other = Store(server.url, namespace=NAMESPACE)
        found = {name: Course(guard(Counted(server.url), other)) for name, guard in GUARDS.items()}
        ears = Ears(found)
        logging.getLogger("resilience").addHandler(ears)
        try:
            at_once(found, lambda course: course.guard.before())
            request.param(server, lambda: at_once(found, Course.while_away))
            at_once(found, Course.after)
        finally:
            logging.getLogger("resilience").removeHandler(ears)
            for each in (other, *(course.guard.store for course in found.values())):
                each.client.close()
        yield found


each_guard = pytest.mark.parametrize("name", GUARDS)


@each_guard
def test_a_guard_gives_the_stated_answer_while_redis_is_away(
    courses: dict[str, Course], name: str
) -> None:
    course = courses[name]
    course.guard.check(course.answers, course.over_s)


@each_guard
def test_a_guard_without_redis_answers_within_100_ms(courses: dict[str, Course], name: str) -> None:
    course = courses[name]
    median = statistics.median(course.took)
    print(
        f"{name}: median {median * 1000:.2f} ms, max {max(course.took) * 1000:.0f} ms, {course.asked} real tries"
    )

    assert len(course.took) == CALLS
    assert median <= 0.1
    assert 2 <= course.asked <= 4, "it looks again, about once a second"


@each_guard
def test_a_lost_redis_and_its_return_are_logged_once(courses: dict[str, Course], name: str) -> None:
    about = [each for each in courses[name].said if each.startswith("Redis at")]

    assert len(about) == 2, about
    assert "does not answer" in about[0]
    assert "answers again" in about[1]


@each_guard
def test_a_guard_shares_its_state_again_once_redis_is_back(
    courses: dict[str, Course], name: str
) -> None:
    print(f"{name}: shared again after {courses[name].back_s:.2f} s")
    assert 0 <= courses[name].back_s <= 5.0
