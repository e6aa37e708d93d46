"""Retries: delays, the attempts that count, and the retry budget of a service."""

from __future__ import annotations

import asyncio
import functools
import heapq
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import resilience.retry
from resilience.breaker import CircuitOpen
from resilience.errors import (
    BulkheadFull,
    CallTimeout,
    Denied,
    InvalidValue,
    RateLimited,
    RetryBudgetExhausted,
)
from resilience.retry import (
    FLOOR_PER_S,
    Retry,
    RetryBudget,
    RetryPolicy,
    RetryState,
    execute_with_retry,
    with_retry,
)
from resilience.store import Store
from tests.unit.world import World, world

__all__ = ["world"]


class Http(Exception):
    """An exception as HTTP clients raise it, with a status and headers."""

    def __init__(self, status_code: int, **headers: str) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Service:
    """A service that gives its answers in order, repeats the last one, and notes the time of each
    call.
    """

    def __init__(self, world: World, *answers: object) -> None:
        self._world, self._answers, self.calls = world, list(answers), list[float]()

    def __call__(self) -> object:
        self.calls.append(self._world.now)
        assert len(self.calls) < 2000, "it is retried for ever"
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def awaited(self) -> object:
        return self()

    @property
    def waits(self) -> list[float]:
        return [after - before for before, after in zip(self.calls, self.calls[1:], strict=False)]


def retry(
    world: World, budget: RetryBudget | None = None, *, seed: int = 0, **fields: Any
) -> Retry:
    return Retry(RetryPolicy(**fields), budget, Random(seed), world.time, world.sleep)


# --- the policy -------------------------------------------------------------------------------


def test_the_defaults() -> None:
    policy = RetryPolicy()

    assert (
        policy.max_attempts,
        policy.initial_delay_s,
        policy.backoff_multiplier,
        policy.max_delay_s,
    ) == (5, 1, 2, 30)
    assert policy.retryable_errors == ("TIMEOUT", "RATE_LIMITED", "SERVICE_UNAVAILABLE")
    assert policy.deadline_s is None


@pytest.mark.parametrize(
    "fields",
    [
        {
            "maxAttempts": 3,
            "initialDelayMs": 500,
            "backoffMultiplier": 3,
            "maxDelayMs": 9000,
            "retryableErrors": ("TIMEOUT",),
        },
        {
            "max_retries": 2,
            "initial_delay": 0.5,
            "backoff_multiplier": 3,
            "max_delay": 9,
            "retryable_errors": ["TIMEOUT"],
        },
        {
            "maxRetries": 2,
            "initialDelay": 0.5,
            "backoffMultiplier": 3,
            "maxDelay": 9,
            "retryableErrors": ["TIMEOUT"],
        },
        {
            "max_attempts": 3,
            "initial_delay_seconds": 0.5,
            "backoff_multiplier": 3,
            "max_delay_ms": 9000,
            "retryableErrors": ["TIMEOUT"],
        },
    ],
)
def test_a_policy_accepts_the_field_names_of_other_libraries(fields: dict[str, Any]) -> None:
    assert RetryPolicy(**fields) == RetryPolicy(
        max_attempts=3,
        initial_delay_s=0.5,
        backoff_multiplier=3,
        max_delay_s=9,
        retryable_errors=("TIMEOUT",),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"max_retries": -1}, "max_retries=-1: must be a whole number from 0 on"),
        ({"maxRetries": "3"}, "maxRetries='3': must be a whole number from 0 on"),
        ({"backoff_multiplier": 0.5}, "backoff_multiplier=0.5"),
        ({"initial_delay_s": -1}, "initial_delay_s=-1"),
        ({"deadline_s": 0}, "deadline_s=0"),
        ({"attempts": 5}, "attempts=5: unknown field; did you mean 'max_attempts'?"),
    ],
)
def test_a_wrong_policy_is_refused_when_a_function_is_decorated(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        RetryPolicy(**fields)
    with pytest.raises(InvalidValue, match=message):
        with_retry(**fields)


@settings(max_examples=300)
@given(
    failures=st.integers(1, 5000),
    initial=st.floats(0, 1e6, allow_subnormal=False),  # subnormal numbers do not multiply exactly
    multiplier=st.floats(1, 100),
    most=st.floats(0, 1e6),
    seed=st.integers(0, 1000),
)
def test_every_delay_is_within_its_bounds(
    failures: int, initial: float, multiplier: float, most: float, seed: int
) -> None:
    policy = RetryPolicy(initial_delay_s=initial, backoff_multiplier=multiplier, max_delay_s=most)
    longest = initial
    for _ in range(failures - 1):
        if longest >= most or multiplier == 1:
            break
        longest *= multiplier

    assert 0 <= policy.delay_s(failures, Random(seed)) <= min(longest, most) * (1 + 1e-9)


def test_the_longest_delay_doubles_with_each_failure_up_to_the_cap() -> None:
    policy, random = RetryPolicy(), Random(1)
    for failures, cap in [
        (1, 1),
        (2, 2),
        (3, 4),
        (4, 8),
        (5, 16),
        (6, 30),
        (7, 30),
        (65, 30),
        (1024, 30),
        (5000, 30),
    ]:
        delays = [policy.delay_s(failures, random) for _ in range(500)]
        assert 0.97 * cap < max(delays) <= cap
        assert sum(delays) / 500 == pytest.approx(cap / 2, rel=0.1), (
            "full jitter: the delays begin at 0"
        )


def test_clients_that_failed_together_retry_at_different_times(world: World) -> None:
    clients = [RetryState(retry(world, seed=seed)) for seed in range(1000)]
    for failures in range(1, 5):
        bins = Counter(int(client.wait_s(Http(503)) * 10) for client in clients)
        if failures >= 3:
            assert max(bins.values()) < 3 * 1000 / (10 * 2 ** (failures - 1)), (
                f"after failure {failures}"
            )


# --- attempts ---------------------------------------------------------------------------------


def test_it_tries_five_times_and_raises_the_last_error(world: World) -> None:
    last = Http(503)
    service = Service(world, *[Http(503)] * 4, last, "never asked")

    with pytest.raises(Http) as caught:
        retry(world).call(service)
    assert caught.value is last
    assert len(service.calls) == 5
    assert all(wait <= longest for wait, longest in zip(service.waits, (1, 2, 4, 8), strict=True))


@pytest.mark.parametrize(
    "error", [TimeoutError(), CallTimeout("call", 1), Http(504), Http(500), ConnectionResetError()]
)
def test_passing_errors_are_retried(world: World, error: Exception) -> None:
    service = Service(world, error, error, "fine")

    assert retry(world).call(service) == "fine"
    assert len(service.calls) == 3


@pytest.mark.parametrize(
    "error", [ValueError("bug"), Http(400), Http(401), MemoryError(), KeyboardInterrupt()]
)
def test_permanent_errors_are_raised_at_once(world: World, error: BaseException) -> None:
    service = Service(world, error)

    with pytest.raises(type(error)) as caught:
        retry(world).call(service)
    assert caught.value is error
    assert len(service.calls) == 1
    assert world.now == service.calls[0]


def test_only_the_given_codes_are_retried(world: World) -> None:
    service = Service(world, Http(503))

    with pytest.raises(Http):
        retry(world, retryable_errors=["TIMEOUT"]).call(service)
    assert len(service.calls) == 1


def test_given_exceptions_are_retried_whatever_their_classification(world: World) -> None:
    service = Service(world, KeyError(1), IndexError(2), "fine")

    assert retry(world, retry_on=(LookupError,)).call(service) == "fine"
    with pytest.raises(ValueError, match="other"):
        retry(world, retry_on=(LookupError,)).call(Service(world, ValueError("other"), "fine"))


def test_a_policy_without_retries_makes_one_attempt(world: World) -> None:
    service = Service(world, Http(503))

    with pytest.raises(Http):
        retry(world, max_retries=0).call(service)
    assert len(service.calls) == 1


@pytest.mark.parametrize(
    ("error", "hint_s"),
    [
        (Http(503, Retry_After="17"), 17),
        (Http(429, Retry_After="17"), 17),
        (Http(429, retry_after_ms="1500"), 1.5),
        (RateLimited("bucket llm", 7.5, "empty"), 7.5),
    ],
)
def test_a_retry_time_of_the_service_is_kept_with_some_jitter(
    world: World, error: Exception, hint_s: float
) -> None:
    waits = []
    for seed in range(50):
        service = Service(world, error, "fine")
        assert retry(world, seed=seed).call(service) == "fine"
        waits += service.waits

    assert hint_s <= min(waits)
    assert max(waits) <= 1.1 * hint_s + 1e-6
    assert max(waits) - min(waits) > 0.05 * hint_s, "the clients do not return all at once"


@pytest.mark.parametrize(
    "refusal", [CircuitOpen("breaker llm", 60, "open"), BulkheadFull("bulkhead llm", 60, "full")]
)
def test_an_open_circuit_and_a_full_bulkhead_are_raised_at_once(
    world: World, refusal: Denied
) -> None:
    service = Service(world, refusal)

    with pytest.raises(type(refusal)):
        retry(world).call(service)
    assert (len(service.calls), world.now) == (1, service.calls[0])
    waiting = Service(world, refusal, "fine")
    assert retry(world, retryable_errors=[refusal.code]).call(waiting) == "fine"


def test_a_slow_call_gets_all_its_attempts(world: World) -> None:
    """Document 0 of the sources: five retries of a job of 300 s."""
    calls: list[float] = []

    def slow() -> None:
        calls.append(world.now)
        world.sleep(300)
        raise TimeoutError("job")

    with pytest.raises(TimeoutError):
        retry(world, maxRetries=5).call(slow)
    assert len(calls) == 6


def test_refusals_without_end_are_raised_after_five_minutes(world: World) -> None:
    for refusal in (Http(429), RateLimited("bucket llm", 7, "empty")):
        began, service = world.now, Service(world, refusal)
        with pytest.raises(type(refusal)):
            retry(world).call(service)
        assert 240 <= world.now - began <= 300


def test_after_a_failure_a_short_retry_time_does_not_shorten_the_delay(world: World) -> None:
    waits = [
        RetryState(retry(world, seed=seed)).wait_s(Http(503, Retry_After="0"))
        for seed in range(200)
    ]

    assert sum(waits) / 200 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "error", [RateLimited("bucket llm", 7, "empty"), Http(429, Retry_After="7"), Http(429)]
)
def test_denials_cost_no_attempt(world: World, error: Exception) -> None:
    service = Service(world, *[error] * 12, *[Http(503)] * 4, "fine")

    assert retry(world).call(service) == "fine"
    assert len(service.calls) == 17


@pytest.mark.parametrize(
    "error",
    [RateLimited("bucket llm", 7, "empty"), Http(429, Retry_After="7"), Http(429), Http(503)],
)
def test_nothing_is_retried_beyond_the_deadline(world: World, error: Exception) -> None:
    service, began = Service(world, error), world.now

    with pytest.raises(type(error)) as caught:
        retry(world, max_attempts=10_000, deadline_s=100).call(service)
    assert caught.value is error
    assert max(service.calls) - began <= 100
    assert world.now == max(service.calls), "there is no delay without a retry after it"


def test_a_retry_time_beyond_the_deadline_ends_the_call_at_once(world: World) -> None:
    service = Service(world, Http(429, Retry_After="301"))

    with pytest.raises(Http):
        retry(world, deadline_s=300).call(service)
    assert len(service.calls) == 1


def test_a_retry_time_of_zero_does_not_lead_to_endless_calls(world: World) -> None:
    service = Service(world, Http(429, Retry_After="0"))

    with pytest.raises(Http):
        retry(world, deadline_s=100).call(service)
    assert len(service.calls) < 2.5 * 100


def test_denials_without_a_retry_time_lead_to_growing_delays(world: World) -> None:
    service = Service(world, Http(429))

    with pytest.raises(Http):
        retry(world).call(service)
    assert len(service.calls) < 50


# --- the budget -------------------------------------------------------------------------------


def spendable(budget: RetryBudget, cost: float = 1.0) -> int:
    return next(number for number in range(1000) if not budget.spend(cost))


def test_a_budget_begins_with_ten_seconds_of_its_floor(world: World) -> None:
    budget = RetryBudget("llm", world.store())

    assert spendable(budget) == 30
    world.sleep(2)
    assert spendable(budget) == 6


def test_ten_first_attempts_pay_for_one_retry_in_any_process(world: World) -> None:
    ours, theirs, other = (RetryBudget(name, world.store()) for name in ("llm", "llm", "db"))
    spendable(ours)
    for _ in range(55):
        theirs.attempted()

    assert spendable(ours) == 0, "the attempts are not reported yet"
    assert spendable(theirs) == 5
    for _ in range(50):
        theirs.attempted()
    assert theirs.spend()
    assert spendable(ours) == 4
    assert spendable(other) == 30, "another service has another budget"


def test_a_budget_holds_at_most_a_hundred_retries(world: World) -> None:
    budget = RetryBudget("llm", world.store())
    for _ in range(100_000):
        budget.attempted()

    assert spendable(budget) == 100
    world.sleep(3000)
    assert spendable(budget) == 100


def test_a_call_that_timed_out_costs_two(world: World) -> None:
    budget = RetryBudget("llm", world.store())
    patient = retry(world, budget, max_attempts=1000, initial_delay_s=0)
    service = Service(world, TimeoutError("slow"))

    with pytest.raises(RetryBudgetExhausted):
        patient.call(service)
    assert len(service.calls) == 1 + 15


def test_the_error_of_a_spent_budget_names_the_last_error(world: World) -> None:
    budget, last = RetryBudget("llm", world.store()), Http(503)
    spendable(budget)

    with pytest.raises(
        RetryBudgetExhausted,
        match="no retry of 'llm': its retry budget is spent, so repair the service; the",
    ) as caught:
        retry(world, budget).call(Service(world, last))
    assert caught.value.last is last
    assert caught.value.__cause__ is last
    assert (caught.value.code, caught.value.service) == ("RETRY_BUDGET_EXHAUSTED", "llm")


def test_denials_and_permanent_errors_spend_nothing_of_the_budget(world: World) -> None:
    store = world.store()
    for error in [Http(429), RateLimited("bucket llm", 50, "empty"), ValueError("bug")]:
        with pytest.raises(type(error)):
            retry(world, RetryBudget("llm", store)).call(Service(world, error))
    with pytest.raises(Http):
        retry(world, RetryBudget("llm", store), max_attempts=1).call(Service(world, Http(503)))

    assert store.round_trips == 0


class Outage:
    """Clients of several processes that call a failing service, each with its own retries."""

    def __init__(self, world: World, stores: list[Store], *, per_s: float, seconds: float) -> None:
        self._world, self.first, self.retries, self.began = world, 0, 0, world.now
        self._budgets = [RetryBudget("llm", store) for store in stores]
        self._due = [
            (self.began + number / per_s, number, None) for number in range(int(per_s * seconds))
        ]
        self._run()

    def _run(self) -> None:
        due: list[tuple[float, int, RetryState | None]] = list(self._due)
        while due:
            self._world.now, number, course = heapq.heappop(due)
            self.first, self.retries = (
                self.first + (course is None),
                self.retries + (course is not None),
            )
            budget = self._budgets[number % len(self._budgets)]
            course = course or retry(self._world, budget, seed=number).begin()
            try:
                heapq.heappush(due, (self._world.now + course.wait_s(Http(503)), number, course))
            except (Http, RetryBudgetExhausted):
                continue

    @property
    def allowed(self) -> float:
        """The number of retries allowed: a tenth of the first attempts, the floor, and the initial
        budget.
        """
        return 0.1 * self.first + FLOOR_PER_S * (self._world.now - self.began) + 10 * FLOOR_PER_S


@pytest.mark.parametrize("processes", [1, 4])
def test_in_an_outage_retries_stay_a_tenth_of_the_load_over_all_processes(
    world: World, processes: int
) -> None:
    outage = Outage(world, [world.store() for _ in range(processes)], per_s=40, seconds=30)

    assert outage.first == 1200
    assert outage.retries <= outage.allowed
    assert outage.retries >= 0.8 * outage.allowed, "the allowed retries are used"


def test_without_redis_only_the_floor_of_the_budget_is_left(world: World) -> None:
    store = world.store()
    budget = RetryBudget("llm", store)
    spendable(budget)
    store.lost = True
    spent = 0
    for _ in range(1000):
        budget.attempted()
        spent += budget.spend()
        world.sleep(0.01)
    assert spent == pytest.approx(10 * FLOOR_PER_S, abs=1), "first attempts add nothing to it"

    store.lost = False
    world.sleep(2)
    assert spendable(budget) >= 30, "shared again"


# --- decorators, and coroutines ---------------------------------------------------------------


def test_coroutines_are_retried_without_blocking(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asleep(seconds: float) -> None:
        world.sleep(seconds)

    def blocked(seconds: float) -> None:
        raise AssertionError(f"blocked for {seconds} s")

    monkeypatch.setattr(asyncio, "sleep", asleep)
    patient = Retry(
        RetryPolicy(), RetryBudget("llm", world.store()), Random(0), world.time, blocked
    )
    service = Service(world, Http(503), Http(429, Retry_After="9"), TimeoutError(), "fine")
    failing = Service(world, Http(503))

    assert asyncio.run(patient.call_async(service.awaited)) == "fine"
    assert 9 <= service.waits[1] <= 9.9
    with pytest.raises(Http):
        asyncio.run(patient.call_async(failing.awaited))
    assert len(failing.calls) == 5


def test_a_cancelled_coroutine_is_not_retried(world: World) -> None:
    service = Service(world, asyncio.CancelledError(), "fine")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(retry(world).call_async(service.awaited))
    assert len(service.calls) == 1


def test_functions_and_coroutine_functions_can_be_decorated(world: World) -> None:
    service = Service(world, Http(503), 1, Http(503), 2)

    @with_retry(max_attempts=2, initial_delay_s=0, service="agent-factory", store=world.store())
    def call(plus: int, *, twice: bool = False) -> object:
        """Call it."""
        return service(), plus, twice

    @with_retry(RetryPolicy(max_attempts=2, initial_delay_s=0))
    async def call_async(plus: int) -> object:
        return service(), plus

    assert call(7, twice=True) == (1, 7, True)
    assert asyncio.run(call_async(8)) == (2, 8)
    assert (call.__name__, call.__doc__) == ("call", "Call it.")
    assert inspect.iscoroutinefunction(call_async)


def test_methods_can_be_decorated(world: World) -> None:
    class Client:
        service = Service(world, Http(503), "fine")

        @with_retry(initial_delay_s=0)
        def ask(self) -> object:
            return self.service()

    assert Client().ask() == "fine"


def test_a_decorator_may_change_some_fields_of_a_policy(world: World) -> None:
    base, service = (
        RetryPolicy(max_attempts=9, initial_delay_s=0, retry_on=(KeyError,)),
        Service(world, KeyError(1)),
    )

    @with_retry(base, max_attempts=3)
    def call() -> object:
        return service()

    with pytest.raises(KeyError):
        call()
    assert len(service.calls) == 3


def test_decorated_functions_of_a_service_share_its_budget(world: World) -> None:
    service = Service(world, Http(503))
    for _ in range(2):

        @with_retry(max_attempts=1000, initial_delay_s=0, service="llm", store=world.store())
        def call() -> object:
            return service()

        with pytest.raises(RetryBudgetExhausted):
            call()

    assert len(service.calls) == pytest.approx(30 + 2, abs=1)


def test_a_function_may_be_called_with_a_policy_and_the_budget_of_a_service(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = world.store()
    monkeypatch.setattr(resilience.retry, "default_store", lambda: store)
    policy = RetryPolicy(initial_delay_s=0)

    def add(first: int, *, second: int, then: Callable[[], object]) -> object:
        return first + second, then()

    for service_name, trips in [("", 0), ("llm", 2)]:
        service = Service(world, Http(503), Http(503), "fine")
        assert execute_with_retry(
            add, 1, policy=policy, service=service_name, second=2, then=service
        ) == (3, "fine")
        assert store.round_trips == trips


def test_successful_calls_add_to_the_budget_of_their_service(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = world.store()
    monkeypatch.setattr(resilience.retry, "default_store", lambda: store)
    spendable(RetryBudget("llm", store))
    for _ in range(100):
        execute_with_retry(lambda: 1, service="llm")

    policy = RetryPolicy(initial_delay_s=0)
    assert (
        execute_with_retry(Service(world, Http(503), "fine"), policy=policy, service="llm")
        == "fine"
    )
    assert spendable(RetryBudget("llm", store)) == 9


def test_a_decorator_accepts_the_field_names_of_other_libraries(world: World) -> None:
    service = Service(world, Http(503))

    @with_retry(maxAttempts=3, initialDelayMs=0)
    def call() -> object:
        return service()

    with pytest.raises(Http):
        call()
    assert len(service.calls) == 3


def test_a_retry_is_one_round_trip_and_a_success_none(world: World) -> None:
    store = world.store()
    patient = retry(world, RetryBudget("llm", store))
    for _ in range(100):
        patient.call(lambda: 1)
    assert store.round_trips == 0

    patient.call(Service(world, Http(503), Http(503), "fine"))
    assert store.round_trips == 2


# --- functions of every kind ------------------------------------------------------------------


def test_a_generator_is_refused_when_it_is_decorated(world: World) -> None:
    def stream() -> Iterator[int]:
        yield 1

    async def stream_async() -> AsyncIterator[int]:
        yield 1

    class WithCall:
        def __call__(self) -> Iterator[int]:
            yield 1

    for function in (stream, stream_async, functools.partial(stream), WithCall()):
        with pytest.raises(InvalidValue, match="a generator cannot be retried, because its first"):
            with_retry(store=world.store())(function)


def test_a_function_that_returns_an_awaitable_is_retried(world: World) -> None:
    answers = iter([TimeoutError(), ConnectionError(), "here"] * 4)

    async def ask() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    class WithCall:
        async def __call__(self) -> Any:
            return await ask()

    def plain() -> Any:
        return asyncio.ensure_future(ask())

    async def call(function: Any) -> Any:
        return await with_retry(initial_delay_s=0, store=world.store())(function)()

    for function in (ask, functools.partial(ask), WithCall(), plain):
        assert asyncio.run(call(function)) == "here"


def test_decorated_methods_of_a_class_are_retried(world: World) -> None:
    answers = iter([TimeoutError(), "here"])

    class Client:
        @with_retry(initial_delay_s=0, store=world.store())
        @classmethod
        def ask(cls) -> Any:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer, cls

    assert Client.ask() == ("here", Client)


def test_a_policy_may_be_a_dict_in_camel_case() -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        execute_with_retry(fails, policy={"maxRetries": 2, "initialDelayMs": 1})
    assert len(calls) == 3
