"""The shared breaker against an oracle: three processes, calls that end late, twice or never, and a
clock.

The oracle is the meaning of a breaker in plain Python: one state, one generation for each
transition, and probes with leases. A process may know less than the oracle, as it uses a state for
up to FRESH_S after it was read. If that leaves several right outcomes, the oracle lists them all
and continues with the one that came.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilience.breaker import CircuitBreaker, CircuitOpen
from resilience.breaker_storage import (
    ASK_AGAIN_S,
    CLOSED,
    FRESH_S,
    HALF_OPEN,
    OPEN,
    Admission,
    BreakerConfig,
)
from resilience.keys import Keys
from tests.unit.world import World

FAILURES, RECOVERY_S, PROBES, LEASE_S, SUCCESSES = 3, 2.0, 2, 1.0, 3
CONFIG = BreakerConfig(
    failure_threshold=FAILURES,
    recovery_timeout_s=RECOVERY_S,
    half_open_max_calls=PROBES,
    half_open_timeout_s=LEASE_S,
    success_threshold=SUCCESSES,
)
PAUSES = (0.0625, 0.125, 0.3125, LEASE_S, RECOVERY_S, 2.5)
"""Shorter and longer than FRESH_S, and the timeouts; sixteenths, so that no sum of them is rounded.
"""
MS = 0.001
"""The server has a resolution of milliseconds."""
ERRORS: dict[str, BaseException | None] = {
    "ok": None,
    "failed": RuntimeError("boom"),
    "ignored": KeyboardInterrupt(),
}


@dataclass(frozen=True)
class Truth:
    """The state of a breaker as the oracle sees it."""

    state: str = CLOSED
    turn: int = 0  # the number of transitions
    changed_at: float = 0.0
    failures: int = 0  # consecutive
    failed_at: float = 0.0
    successes: int = 0  # successful probes of this turn
    probes: dict[str, float] = field(default_factory=dict)  # permit -> end of its lease

    def moved(self, state: str, now: float) -> Truth:
        failures = 0 if state == CLOSED else self.failures
        return replace(
            self, state=state, turn=self.turn + 1, changed_at=now, failures=failures, successes=0
        )

    def due(self, now: float) -> Truth:
        """Return the half-open state once it has been open for the recovery time."""
        over = self.state == OPEN and now >= self.changed_at + RECOVERY_S
        return self.moved(HALF_OPEN, now) if over else self

    def live(self, now: float) -> int:
        return sum(until > now for until in self.probes.values())

    def without(self, permit: str) -> Truth:
        return replace(
            self, probes={each: until for each, until in self.probes.items() if each != permit}
        )

    def probed(self, permit: str, outcome: str, now: float) -> Truth:
        """Return the state after a probe of this turn has ended."""
        if outcome == "failed":
            failed = replace(self.without(permit), failures=self.failures + 1)
            return failed.moved(OPEN, now)
        after = replace(self.without(permit), successes=self.successes + (outcome == "ok"))
        return after.moved(CLOSED, now) if after.successes >= SUCCESSES else after

    def called(self, outcome: str, now: float) -> Truth:
        """Return the state after a call of this turn has ended while it was closed."""
        if outcome == "ignored":
            return self
        after = (
            replace(self, failures=self.failures + 1, failed_at=now)
            if outcome == "failed"
            else replace(self, failures=0)
        )
        return after.moved(OPEN, now) if after.failures >= FAILURES else after


@dataclass
class OpenAdmission:
    """An admission, with its process and time; it may end more than once."""

    number: int
    admission: Admission
    at: float


@dataclass(frozen=True)
class Stored:
    """The stored fields, as the header of breaker.lua lists them."""

    state: str = CLOSED
    generation: int = 0
    until: float = 0.0
    failures: int = 0
    successes: int = 0


class BreakerMachine(RuleBasedStateMachine):
    """Breakers of three processes, beside the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.world = pytest.MonkeyPatch(), World()
        self.world.install(self.patch)
        self.client, self.key = self.world.client(), Keys("unit").breaker("llm")[0]
        self.truth, self.generation = Truth(), 0
        self.closed_until: dict[
            str, float
        ] = {}  # generation -> its end, for those in which it was closed
        self.processes = [self.process() for _ in range(3)]
        self.refused_at = [float("-inf")] * 3
        self.taken: list[OpenAdmission] = []

    def process(self) -> CircuitBreaker:
        return CircuitBreaker("llm", self.world.store(), CONFIG)

    # --- the stored state ---------------------------------------------------------------------

    def stored(self) -> Stored:
        raw: dict[Any, Any] = self.client.hgetall(self.key)
        found = {name.decode(): value.decode() for name, value in raw.items()}
        if not found:
            return Stored()
        return Stored(
            found["st"],
            int(found["gen"]),
            float(found["till"]) / 1000,
            int(found["f"]),
            int(found["hs"]),
        )

    def settled(self) -> bool:
        """Return whether every process that has asked since knows of the last transition."""
        return self.world.now - self.truth.changed_at > FRESH_S

    def become(self, *right: Truth) -> None:
        """Continue with the one of the right outcomes that is stored."""
        found, now = self.stored(), self.world.now
        fits = [
            each
            for each in right
            if (each.state, each.failures, each.successes)
            == (found.state, found.failures, found.successes)
        ]
        assert fits, f"{found} is none of {right}"
        before, self.truth = self.truth, fits[0]
        if self.truth.turn == before.turn:
            assert found.generation == self.generation
            return
        assert found.generation > self.generation, "each transition is a new generation"
        if before.state == CLOSED:
            self.closed_until[str(self.generation)] = now
        self.generation = found.generation
        till = now + RECOVERY_S if found.state == OPEN else 0
        assert found.until == pytest.approx(till, abs=MS), "open for exactly the recovery time"

    # --- rules --------------------------------------------------------------------------------

    @rule(number=st.integers(0, 2), waiter=st.sampled_from(["", "", "somebody"]))
    def admit(self, number: int, waiter: str = "") -> None:
        try:
            admission = self.processes[number].admit(waiter)
        except CircuitOpen as refusal:
            self.refused(number, refusal, asked=bool(waiter))
            return
        self.taken.append(OpenAdmission(number, admission, self.world.now))
        if admission.probe:
            self.probe(admission)
        else:
            self.passed(admission)

    def refused(self, number: int, refusal: CircuitOpen, *, asked: bool) -> None:
        """The script answers a caller with a waiter; other callers may use the known state."""
        now, due = self.world.now, self.truth.due(self.world.now)
        rightly = due.state == OPEN or (due.state == HALF_OPEN and due.live(now) == PROBES)
        believed = not self.settled() or now - self.refused_at[number] < ASK_AGAIN_S
        assert rightly or (believed and not asked), f"refused, although it is {due}"
        assert 0 < refusal.retry_after_s <= RECOVERY_S
        if due.state == OPEN and (asked or self.settled()):
            assert refusal.retry_after_s == pytest.approx(
                self.truth.changed_at + RECOVERY_S - now, abs=MS
            )
        self.refused_at[number] = now
        self.become(self.truth)

    def probe(self, admission: Admission) -> None:
        now, due = self.world.now, self.truth.due(self.world.now)
        assert due.state == HALF_OPEN, f"there must be no probe, it is {due}"
        assert due.live(now) < PROBES, "more probes than allowed"
        live = {permit: until for permit, until in due.probes.items() if until > now}
        self.become(replace(due, probes={**live, admission.probe: now + LEASE_S}))
        assert admission.generation == str(self.generation)

    def passed(self, admission: Admission) -> None:
        if self.truth.state == CLOSED and admission.generation == str(self.generation):
            return
        assert self.world.now - self.closed_until[admission.generation] <= FRESH_S, (
            "it is not closed, and the process knows it"
        )

    @precondition(lambda self: self.taken)
    @rule(
        at=st.integers(0, 20),
        outcome=st.sampled_from(["ok", "ok", "failed", "ignored"]),
        again=st.integers(0, 3),
    )
    def end(self, at: int, outcome: str, again: int) -> None:
        """End a call, early or late; one in four stays open and will end again."""
        at = max(0, len(self.taken) - 1 - at)
        taken = self.taken[at]
        if again:
            del self.taken[at]
        self.processes[taken.number].ended(taken.admission, ERRORS[outcome])
        self.become(*self.outcomes(taken, outcome))

    def outcomes(self, taken: OpenAdmission, outcome: str) -> list[Truth]:
        truth, now, permit = self.truth, self.world.now, taken.admission.probe
        if permit:
            until = truth.probes.get(permit)
            if until is None:
                return [truth]
            if (
                until <= now
                or truth.state != HALF_OPEN
                or taken.admission.generation != str(self.generation)
            ):
                return [truth.without(permit)]  # only its place as a probe in flight is free again
            return [truth.probed(permit, outcome, now)]
        if truth.state != CLOSED or taken.admission.generation != str(self.generation):
            return [truth]
        # A process reports a success only if it knows of failures. It knows for certain of
        # those from before the call.
        knew = outcome != "ok" or taken.at - truth.failed_at > FRESH_S
        return [truth.called(outcome, now)] + ([] if knew else [truth])

    @rule(number=st.integers(0, 2), times=st.integers(1, FAILURES))
    def calls_fail(self, number: int, times: int) -> None:
        for _ in range(times):
            self.call(number, "failed")

    @precondition(lambda self: self.truth.state != CLOSED or self.truth.failures)
    @rule(number=st.integers(0, 2))
    def a_call_succeeds(self, number: int) -> None:
        self.call(number, "ok")

    def call(self, number: int, outcome: str) -> None:
        before = len(self.taken)
        self.admit(number)
        if len(self.taken) > before:
            self.end(0, outcome, 1)

    @precondition(lambda self: self.truth.state != CLOSED)
    @rule(
        numbers=st.lists(st.integers(0, 2), min_size=2, max_size=5),
        early=st.sampled_from([0.0, 0.0, 0.125]),
    )
    def several_ask_when_the_recovery_time_is_over(self, numbers: list[int], early: float) -> None:
        """Or just before it, with one caller that the script must answer."""
        until = self.truth.changed_at + RECOVERY_S - early
        self.world.sleep(max(0.0, until - self.world.now) if self.truth.state == OPEN else 0.0)
        self.admit(numbers[0], "somebody")
        for number in numbers:
            self.admit(number)

    @precondition(lambda self: any(each.admission.probe for each in self.taken))
    @rule(
        outcome=st.sampled_from(["ok", "ok", "ok", "failed", "ignored"]),
        again=st.integers(0, 2),
        late=st.integers(0, 5),
    )
    def a_probe_ends(self, outcome: str, again: int, late: int) -> None:
        """In time, or when its lease is over."""
        if not late:
            self.world.sleep(LEASE_S)
        at = next(at for at, each in enumerate(reversed(self.taken)) if each.admission.probe)
        self.end(at, outcome, again)

    @precondition(lambda self: self.truth.state == CLOSED and self.taken)
    @rule(number=st.integers(0, 2))
    def it_opens_and_closes_while_calls_run(self, number: int) -> None:
        for outcome in ["failed"] * FAILURES + ["ok"] * SUCCESSES:
            self.world.sleep(RECOVERY_S if self.truth.state == OPEN else 0)
            self.call(number, outcome)

    @precondition(lambda self: self.truth.state == CLOSED and self.taken)
    @rule(at=st.integers(0, 5), outcome=st.sampled_from(["ok", "failed", "failed"]))
    def old_calls_end(self, at: int, outcome: str) -> None:
        for _ in range(FAILURES):
            self.end(len(self.taken) - 1 - at % len(self.taken), outcome, 0)

    @precondition(lambda self: any(each.admission.probe for each in self.taken))
    @rule()
    def a_process_dies_with_its_probe(self) -> None:
        dead = next(each.number for each in reversed(self.taken) if each.admission.probe)
        self.taken = [each for each in self.taken if each.number != dead]
        self.processes[dead], self.refused_at[dead] = self.process(), float("-inf")

    @rule(seconds=st.sampled_from(PAUSES))
    def time_passes(self, seconds: float) -> None:
        self.world.sleep(seconds)

    @rule(
        number=st.integers(0, 2),
        state=st.sampled_from([CLOSED, OPEN, HALF_OPEN]),
        really=st.integers(0, 3),
    )
    def by_hand(self, number: int, state: str, really: int) -> None:
        if really:
            return  # rarely: most situations need several steps to arise
        breaker = self.processes[number]
        {CLOSED: breaker.reset, OPEN: breaker.open, HALF_OPEN: breaker.half_open}[state]()
        self.refused_at[number] = float("-inf")
        self.become(self.truth.moved(state, self.world.now))

    # --- invariants ---------------------------------------------------------------------------

    @invariant()
    def nothing_else_changed(self) -> None:
        self.become(self.truth)

    @precondition(lambda self: self.settled())
    @invariant()
    def reading_the_state_changes_nothing(self) -> None:
        breaker = self.processes[self.truth.turn % 3]
        assert breaker.state == self.truth.state
        self.become(self.truth)

    def teardown(self) -> None:
        """The service answers again, and the breaker closes from any state."""
        try:
            self.heal()
        finally:
            self.patch.undo()

    def heal(self) -> None:
        for turn in range(40):
            if self.truth.state == CLOSED:
                break
            self.world.sleep(0.3125)
            self.call(turn % 3, "ok")
        assert self.truth.state == CLOSED
        self.world.sleep(2 * FRESH_S)
        for breaker in self.processes:
            assert breaker.call(lambda: "answered") == "answered"


TestBreakerAgainstAnOracle = BreakerMachine.TestCase
TestBreakerAgainstAnOracle.settings = settings(max_examples=60, stateful_step_count=40)
