"""The shared circuit breaker: admission of calls, the effect of their ends, and its listeners."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pybreaker
import pytest

from resilience.breaker import CircuitBreaker, CircuitBreakers, CircuitOpen, with_circuit_breaker
from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate, TokenBucket
from resilience.bulkhead import Bulkhead
from resilience.errors import InvalidValue, RateLimited
from resilience.retry import with_retry
from resilience.store import Store
from tests.unit.world import World, world

__all__ = ["world"]

CONFIG = BreakerConfig(
    failure_threshold=3,
    recovery_timeout_s=10,
    half_open_max_calls=2,
    half_open_timeout_s=5,
    success_threshold=2,
)


def fail(error: type[BaseException] = RuntimeError) -> None:
    raise error("boom")


def trip(breaker: CircuitBreaker, times: int = 3) -> None:
    for _ in range(times):
        with pytest.raises(RuntimeError):
            breaker.call(fail)


def test_it_opens_after_consecutive_failures_in_every_process(world: World) -> None:
    ours, theirs = (CircuitBreaker("llm", world.store(), CONFIG) for _ in range(2))
    assert theirs.call(lambda: 1) == 1

    trip(ours)

    assert ours.state == "open"
    world.sleep(0.26)
    with pytest.raises(CircuitOpen) as caught:
        theirs.call(lambda: 1)
    assert caught.value.code == "CIRCUIT_OPEN"
    assert isinstance(caught.value, pybreaker.CircuitBreakerError)
    assert caught.value.retry_after_s == pytest.approx(10 - 0.26)
    assert theirs.failure_count == 3
    assert theirs.last_failure_time == pytest.approx(world.now - 0.26, abs=0.001)


def test_a_success_resets_the_count_of_failures(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    trip(breaker, 2)
    breaker.call(lambda: 1)
    trip(breaker, 2)

    assert breaker.state == "closed"


def test_a_closed_breaker_costs_no_round_trip(world: World) -> None:
    store = world.store()
    breaker = CircuitBreaker("llm", store, CONFIG)
    breaker.call(lambda: 1)
    before = store.round_trips

    for _ in range(1000):
        breaker.call(lambda: 1)

    assert store.round_trips == before


def test_all_breakers_of_a_process_are_read_in_one_round_trip(world: World) -> None:
    store = world.store()
    many = [CircuitBreaker(f"service-{i}", store, CONFIG) for i in range(20)]
    many[0].call(lambda: 1)
    before = store.round_trips
    world.sleep(0.3)
    for breaker in many:
        breaker.call(lambda: 1)

    assert store.round_trips == before + 1


def test_half_open_admits_a_fixed_number_of_probes_over_all_processes(world: World) -> None:
    processes = [CircuitBreaker("llm", world.store(), CONFIG) for _ in range(8)]
    trip(processes[0])
    world.sleep(10.01)

    admitted, refused = [], 0
    for breaker in processes:
        try:
            admitted.append((breaker, breaker.admit()))
        except CircuitOpen:
            refused += 1

    assert (len(admitted), refused) == (2, 6)
    for breaker, admission in admitted:
        breaker.ended(admission)
    world.sleep(0.3)
    assert {breaker.state for breaker in processes} == {"closed"}


def test_a_probe_that_never_ends_frees_its_place_after_its_lease(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    trip(breaker)
    world.sleep(10.01)
    for _ in range(2):
        breaker.admit()
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit()
    assert caught.value.retry_after_s == pytest.approx(5, abs=0.01)

    world.sleep(5.01)
    late = breaker.admit()
    breaker.ended(late)
    assert breaker.state == "half-open"


def test_calls_admitted_before_a_transition_do_not_count_after_it(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    early = breaker.admit()
    trip(breaker)
    until = breaker.status()["retry_after_s"]
    breaker.ended(early, RuntimeError())
    assert breaker.status()["retry_after_s"] == until, (
        "a late failure does not keep it open for longer"
    )

    world.sleep(10.01)
    probes = [breaker.admit(), breaker.admit()]
    world.sleep(5.01)
    breaker.ended(probes[0])
    assert breaker.state == "half-open", "its lease was over"


def test_a_failed_probe_opens_the_breaker_again(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    trip(breaker)
    world.sleep(10.01)
    breaker.call(lambda: 1)
    assert breaker.state == "half-open"
    assert breaker.success_counter == 1
    trip(breaker, 1)
    assert breaker.status()["retry_after_s"] == pytest.approx(10)
    assert breaker.failure_count == CONFIG.failure_threshold + 1, "a failed probe is a failure"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, MemoryError]
)
def test_cancellation_and_exit_are_no_failures(world: World, error: type[BaseException]) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    for _ in range(5):
        with pytest.raises(error):
            breaker.call(fail, error)

    assert (breaker.state, breaker.failure_count) == ("closed", 0)


def test_rate_limits_and_excluded_errors_are_no_failures(world: World) -> None:
    breaker = CircuitBreaker(
        "llm", world.store(), CONFIG, exclude=[LookupError, lambda error: "fine" in str(error)]
    )

    def raise_(error: Exception) -> None:
        raise error

    for error in [
        RateLimited("bucket", 1, "empty"),
        KeyError(1),
        ValueError("fine"),
        InvalidValue("f", 1, "no"),
    ] * 3:
        with pytest.raises(type(error)):
            breaker.call(raise_, error)
    assert breaker.failure_count == 0


def test_a_failure_rate_opens_it(world: World) -> None:
    breaker = CircuitBreaker(
        "llm",
        world.store(),
        configured := BreakerConfig(
            failure_threshold=100,
            failure_rate=0.5,
            window_s=10,
            min_calls=20,
            recovery_timeout_s=10,
        ),
    )
    assert configured.failure_rate == 0.5
    for _ in range(12):
        breaker.call(lambda: 1)
    world.sleep(0.3)  # successes counted locally are sent with the next read
    trip(breaker, 11)
    assert breaker.state == "closed", "11 of 23"
    trip(breaker, 1)
    assert breaker.state == "open", "12 of 24"


def test_old_calls_leave_the_window(world: World) -> None:
    breaker = CircuitBreaker(
        "llm",
        world.store(),
        BreakerConfig(failure_threshold=100, failure_rate=0.5, window_s=10, min_calls=5),
    )
    trip(breaker, 4)
    world.sleep(12)
    trip(breaker, 4)
    assert breaker.state == "closed"
    trip(breaker, 1)
    assert breaker.state == "open"


def test_a_process_that_uses_too_much_memory_opens_its_own_breaker(world: World) -> None:
    size = [100.0]
    config = BreakerConfig(memory_threshold_mb=2048, recovery_timeout_s=60)
    bloated = CircuitBreaker("llm", world.store(), config, memory_mb=lambda: size[0])
    other = CircuitBreaker("llm", world.store(), config, memory_mb=lambda: 100)
    bloated.call(lambda: 1)
    size[0] = 3000
    world.sleep(0.3)

    with pytest.raises(CircuitOpen, match="memory_threshold_mb=2048"):
        bloated.call(lambda: 1)
    assert bloated.state == "open"
    assert bloated.can_execute()[0] is False
    assert other.call(lambda: 1) == 1
    size[0] = 100
    world.sleep(60)
    assert bloated.call(lambda: 1) == 1


class Recorder(pybreaker.CircuitBreakerListener):
    """A listener as pybreaker's users write them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append("before")

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.calls.append(type(exc).__name__)

    def success(self, cb: Any) -> None:
        self.calls.append("success")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.calls.append(f"{old_state.name} -> {new_state.name}")


def test_listeners_get_the_calls_of_pybreaker_and_changes_by_other_processes(world: World) -> None:
    ours, theirs = Recorder(), Recorder()
    mine = CircuitBreaker("llm", world.store(), CONFIG, listeners=[ours])
    other = CircuitBreaker("llm", world.store(), CONFIG, listeners=[theirs])
    mine.call(lambda: 1)
    trip(mine)
    world.sleep(0.3)
    assert other.state == "open"

    assert ours.calls == ["before", "success", *["before", "RuntimeError"] * 3, "closed -> open"]
    assert theirs.calls == ["closed -> open"]


def test_it_protects_functions_coroutines_and_blocks(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)

    @breaker
    def double(number: int) -> int:
        return 2 * number

    @with_circuit_breaker("agent-factory", store=world.store(), failure_threshold=5)
    async def triple(number: int) -> int:
        return 3 * number

    assert double(2) == 4
    assert asyncio.run(triple(2)) == 6
    for _ in range(3):
        with pytest.raises(RuntimeError), breaker.calling():
            raise RuntimeError
    with pytest.raises(CircuitOpen):
        double(2)


def test_it_can_be_opened_half_opened_and_reset_by_hand(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    breaker.open()
    assert breaker.can_execute() == (False, "breaker llm: its circuit is open; come back in 10 s")
    breaker.half_open()
    assert breaker.can_execute() == (True, "")
    breaker.reset()
    assert breaker.state == "closed"


def test_the_registry_shows_and_resets_the_breakers_of_all_processes(world: World) -> None:
    ours, theirs = CircuitBreakers(world.store()), CircuitBreakers(world.store())
    trip(ours.get("D3-Q3", "realtime"))
    trip(ours.get("D4-Q2", CONFIG))

    can, why = theirs.can_execute("D3-Q3")
    assert not can
    assert "open" in why
    assert theirs.status()["D4-Q2"]["state"] == "open"
    assert theirs.names() == ["D3-Q3", "D4-Q2"]
    assert theirs.reset("D3-Q3") == ["D3-Q3"]
    assert theirs.can_execute("D3-Q3") == (True, "")
    assert theirs.reset() == ["D3-Q3", "D4-Q2"]
    assert {each["state"] for each in theirs.status().values()} == {"closed"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"failure_threshold": 0}, "failure_threshold=0"),
        (
            {"failureTreshold": 5},
            "failureTreshold=5: unknown field; did you mean 'failure_threshold'?",
        ),
        ({"config": "fast"}, "preset='fast': unknown; must be one of default"),
        ({"recovery_timeout_s": -1}, "recovery_timeout_s=-1"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        with_circuit_breaker("x", **fields)


def test_without_redis_each_process_continues_with_its_last_state(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    store = world.store()
    open_, closed = CircuitBreaker("a", store, CONFIG), CircuitBreaker("b", store, CONFIG)
    trip(open_)
    assert closed.call(lambda: 1) == 1
    store.lost = True
    world.sleep(1)

    with pytest.raises(CircuitOpen) as caught:
        open_.call(lambda: 1)
    assert caught.value.retry_after_s == pytest.approx(9)
    trip(closed)
    with pytest.raises(CircuitOpen):
        closed.call(lambda: 1)
    world.sleep(10.1)
    assert (open_.call(lambda: 1), closed.call(lambda: 1)) == (1, 1)
    assert closed.state == "closed"
    store.lost = False
    world.sleep(2)
    assert open_.call(lambda: 1) == 1

    assert [record.message[:30] for record in caplog.records if "Redis" in record.message] == [
        "Redis at redis://fake does not",
        "Redis at redis://fake answers ",
    ]


def test_a_probe_does_not_count_after_its_lease(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    breaker.half_open()
    probes = [breaker.admit(), breaker.admit()]
    world.sleep(5)
    for probe in probes:
        breaker.ended(probe)

    assert (breaker.state, breaker.success_counter) == ("half-open", 0)


def test_successes_of_calls_admitted_before_half_open_do_not_count_in_the_window(
    world: World,
) -> None:
    config = BreakerConfig(
        failure_threshold=100, failure_rate=0.5, min_calls=4, success_threshold=1
    )
    breaker = CircuitBreaker("llm", world.store(), config)
    early = [breaker.admit() for _ in range(100)]
    breaker.half_open()
    breaker.call(lambda: 1)
    for admission in early:
        breaker.ended(admission)
    world.sleep(0.3)
    trip(breaker, 4)

    assert breaker.state == "open"


def test_without_redis_calls_admitted_before_a_transition_do_not_count_after_it(
    world: World,
) -> None:
    store = world.store()
    store.lost = True
    breaker = CircuitBreaker("llm", store, CONFIG)
    calls = [breaker.admit() for _ in range(6)]
    for admission in calls[:3]:
        breaker.ended(admission, RuntimeError())
    breaker.ended(calls[3])
    breaker.ended(calls[4], RuntimeError())

    assert breaker.state == "open"
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit()
    assert caught.value.retry_after_s == pytest.approx(10)


def test_calls_admitted_without_redis_do_not_count_once_it_answers_again(world: World) -> None:
    store = world.store()
    store.lost = True
    ours, theirs = (
        CircuitBreaker("llm", store, CONFIG),
        CircuitBreaker("llm", world.store(), CONFIG),
    )
    alone = ours.admit()
    store.lost = False
    world.sleep(2)
    theirs.open()
    assert ours.state == "open"
    ours.ended(alone)

    assert ours.state == "open"


def test_waiters_are_woken_in_order_of_urgency_when_the_breaker_closes(world: World) -> None:
    woken: list[str] = []
    breaker = CircuitBreaker("llm", world.store(), CONFIG, wake=woken.extend)
    trip(breaker)
    waits = []
    for waiter, urgency in [
        ("normal", 2),
        ("normal 2", 2),
        ("low", 3),
        ("low 2", 3),
        ("critical", 0),
    ]:
        with pytest.raises(CircuitOpen) as caught:
            breaker.admit(waiter, urgency)
        waits.append(caught.value.retry_after_s)
    assert waits == pytest.approx([10, 10, 11, 11, 10]), (
        "two waiters return at a time, as there are two probes"
    )
    breaker.reset()
    assert woken == ["critical", "normal", "normal 2", "low", "low 2"]


# --- functions of every kind ------------------------------------------------------------------


class Service:
    """A service in all forms of Python's functions; it breaks after two items, or not."""

    def __init__(self) -> None:
        self.breaks, self.closed = True, 0

    def numbers(self) -> Iterator[int]:
        try:
            yield 1
            yield 2
            if self.breaks:
                raise ConnectionError("the stream broke")
        finally:
            self.closed += 1

    async def numbers_async(self) -> AsyncIterator[int]:
        for number in self.numbers():
            yield number

    async def total(self) -> int:
        return sum(self.numbers())

    def all_at_once(self) -> int:
        return sum(self.numbers())


def drained(stream: Any) -> Any:
    """Use the value of a call to its end, whatever its kind."""
    if inspect.isasyncgen(stream):

        async def drain() -> list[int]:
            return [item async for item in stream]

        return asyncio.run(drain())
    if inspect.isawaitable(stream):

        async def wait() -> Any:
            return await stream

        return asyncio.run(wait())
    return list(stream) if inspect.isgenerator(stream) else stream


class WithCall:
    """An object with ``__call__``."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self) -> Any:
        return self._function()


def plain(function: Any) -> Any:
    """Return a plain function that returns the value of another one, as many decorators do."""

    def call() -> Any:
        return function()

    return call


FORMS: dict[str, Any] = {
    "generator": lambda service: service.numbers,
    "async generator": lambda service: service.numbers_async,
    "coroutine function": lambda service: service.total,
    "function": lambda service: service.all_at_once,
    "partial of a generator": lambda service: functools.partial(service.numbers),
    "partial of an async generator": lambda service: functools.partial(service.numbers_async),
    "object": lambda service: WithCall(service.all_at_once),
    "object with a generator": lambda service: WithCall(service.numbers),
    "object with an async generator": lambda service: WithCall(service.numbers_async),
    "object with a coroutine function": lambda service: WithCall(service.total),
    "function that returns a generator": lambda service: plain(service.numbers),
    "function that returns an awaitable": lambda service: plain(service.total),
}
each_form = pytest.mark.parametrize("form", FORMS)


@each_form
def test_a_breaker_counts_the_failures_of_a_function_of_any_kind(world: World, form: str) -> None:
    service, breaker = Service(), CircuitBreaker("llm", world.store(), CONFIG)
    guarded = breaker(FORMS[form](service))
    service.breaks = False
    assert drained(guarded()) in (3, [1, 2])
    service.breaks = True

    for failed in range(1, 4):
        with pytest.raises(ConnectionError):
            drained(guarded())
        assert breaker.failure_count == failed
    assert breaker.state == "open"
    with pytest.raises(CircuitOpen):
        drained(guarded())
    assert service.closed == 4, "a refused call does not run"


@each_form
def test_a_call_through_a_breaker_counts_like_a_decorated_one(world: World, form: str) -> None:
    service, breaker = Service(), CircuitBreaker("llm", world.store(), CONFIG)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            drained(breaker.call(FORMS[form](service)))
    assert breaker.state == "open"


def test_decorated_methods_of_a_class_are_guarded_in_either_order(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)

    class Client:
        @breaker
        @classmethod
        def above(cls) -> str:
            raise ConnectionError(cls.__name__)

        @classmethod
        @breaker
        def below(cls) -> str:
            raise ConnectionError(cls.__name__)

        @breaker
        @staticmethod
        def static() -> str:
            raise ConnectionError("Client")

    for method in (Client.above, Client().below, Client.static):
        with pytest.raises(ConnectionError, match="Client"):
            method()
    assert breaker.state == "open"


def test_the_kind_of_a_decorated_function_stays(world: World) -> None:
    breaker, service = CircuitBreaker("llm", world.store(), CONFIG), Service()

    assert inspect.isgeneratorfunction(breaker(service.numbers))
    assert inspect.isasyncgenfunction(breaker(service.numbers_async))
    assert inspect.iscoroutinefunction(breaker(service.total))
    assert breaker(service.numbers).__name__ == "numbers"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_that_its_reader_closes_early_is_a_success(world: World, is_async: bool) -> None:
    service, breaker = Service(), CircuitBreaker("llm", world.store(), CONFIG)
    trip(breaker, 2)

    async def read_one() -> None:
        stream = breaker(service.numbers_async)()
        assert await anext(stream) == 1
        await stream.aclose()

    if is_async:
        asyncio.run(read_one())
    else:
        stream = breaker(service.numbers)()
        assert next(stream) == 1
        stream.close()
    assert (service.closed, breaker.failure_count) == (1, 0)


@pytest.mark.parametrize("is_async", [False, True])
def test_values_and_errors_reach_a_guarded_generator(world: World, is_async: bool) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)

    @breaker
    def echo() -> Generator[Any, Any, str]:
        got = None
        while got != "end":
            try:
                got = yield got
            except LookupError:
                got = "caught"
        return "returned"

    @breaker
    async def echo_async() -> AsyncGenerator[Any, Any]:
        for_sync = echo()
        got = next(for_sync)
        while True:
            try:
                sent = yield got
            except LookupError as error:
                got = for_sync.throw(error)
            else:
                got = for_sync.send(sent)

    async def talk() -> list[Any]:
        stream = echo_async()
        said = [await stream.asend(None), await stream.asend(5), await stream.athrow(KeyError(1))]
        await stream.aclose()
        return said

    if is_async:
        assert asyncio.run(talk()) == [None, 5, "caught"]
        return
    stream = echo()
    assert [next(stream), stream.send(5), stream.throw(KeyError(1))] == [None, 5, "caught"]
    with pytest.raises(StopIteration) as stopped:
        stream.send("end")
    assert stopped.value.value == "returned"


def test_a_probe_whose_stream_is_thrown_away_gives_its_place_back(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)
    breaker.half_open()
    service = Service()
    for _ in range(3 * CONFIG.half_open_max_calls):
        breaker.call(service.numbers)  # nobody reads it
    assert breaker.state == "half-open"
    assert breaker.success_counter == 0, "nothing has run"


def test_a_future_of_a_guarded_function_stays_a_future(world: World) -> None:
    breaker = CircuitBreaker("llm", world.store(), CONFIG)

    async def call() -> None:
        @breaker
        def begin(fails: bool) -> asyncio.Future[int]:
            future = asyncio.get_running_loop().create_future()
            if fails:
                future.set_exception(ConnectionError())
            else:
                future.set_result(7)
            return future

        task = begin(False)
        assert isinstance(task, asyncio.Future)
        assert await task == 7
        for _ in range(3):
            with pytest.raises(ConnectionError):
                await begin(True)

    asyncio.run(call())
    assert breaker.state == "open"


NAMED: dict[str, Callable[[Any, Store], Any]] = {
    "breaker": CircuitBreaker,
    "breakers": lambda name, store: CircuitBreakers(store).get(name),
    "decorator": lambda name, store: with_circuit_breaker(name, store=store),
    "bulkhead": Bulkhead,
    "bucket": lambda name, store: TokenBucket(name, store, requests=Rate(5)),
    "retry": lambda name, store: with_retry(service=name, store=store),
}


@pytest.mark.parametrize("guard", NAMED)
@pytest.mark.parametrize("name", [None, 5, b"payments", ["payments"], "\udce9", "a\n", "x" * 201])
def test_a_guard_is_refused_when_its_name_is_no_text(world: World, guard: str, name: Any) -> None:
    """A process reads all its breakers together: one wrong name would fail each of them."""
    with pytest.raises(InvalidValue, match="must be a text of 1 to 200 printable characters"):
        NAMED[guard](name, world.store())
    assert CircuitBreaker("payments", world.store()).call(lambda: 5) == 5
