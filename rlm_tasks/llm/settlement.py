"""The end of a call to a model: its cost is settled, and its answer lands.

`gate` takes the grants of a `HeldCall`; `Settlement.leave` gives them back.  Each step is made,
even if another one raises, so no charge, no flight and no place is left over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.errors import Category, Denied, RateLimited, StoreUnavailable
from resilience.store import Call, together
from rlm_tasks.jobs import codec
from rlm_tasks.llm import metrics
from rlm_tasks.llm.endpoint_pool import BYTES_PER_TOKEN, MARGIN, NOTHING, Bill
from rlm_tasks.llm.learned import AnsweredCall, CallKind, SlotPace
from rlm_tasks.llm.wire.answers import TokenUsage, estimated_tokens
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, UnusableAnswer

if TYPE_CHECKING:
    from resilience.breaker_storage import Admission
    from resilience.bucket import Grant
    from resilience.budget import Charge, SharedBudget
    from resilience.bulkhead import Permit
    from resilience.single_flight import Flight
    from resilience.store import Store
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.llm.draft import Draft
    from rlm_tasks.llm.endpoint_pool import EndpointPool
    from rlm_tasks.llm.wire.answers import Answer, Question
    from rlm_tasks.operations.context import Context

MEMO_S = 3600.0
"""Seconds for which an item keeps its paid answer, in case it runs again before its node ends."""


@dataclass(slots=True)
class HeldCall:
    """One call with the grants that it holds."""

    draft: Draft
    flight: Flight
    index: int  # number of its item
    model: str  # the model of its tier; another one may answer
    digest: str  # hash of the question to this model
    reply: Callable[[Context], Awaitable[Any]]  # returns the answer to its item
    question: Question | None = None  # None: another call has the answer, or will have it
    endpoint: str = ""
    reserved: Bill | None = None  # the most that it may cost
    charge: Charge | None = None
    grant: Grant | None = None
    admission: Admission | None = None
    permit: Permit | None = None
    estimated: int = 0  # tokens of the prompt, without corrections from earlier calls
    answer: Answer | None = None


def memo_of(spec: JobSpec, index: int) -> str:
    """Return the name of the memo that keeps the answers of one item."""
    return f"{spec.job}:{index}"


class Settlement:
    """The ends of the calls of one job, in one process."""

    def __init__(
        self, pool: EndpointPool, budget: SharedBudget, spec: JobSpec, store: Store
    ) -> None:
        self._pool, self._budget, self._spec, self._store = pool, budget, spec, store
        self.kind = CallKind.of(spec.operation, spec.params)
        self.pace = SlotPace(pool.learned.clock)
        self.memos: list[tuple[int, str]] = []
        """The items that have an answer in a memo, with its key."""

    def leave(self, held: HeldCall, error: BaseException | None = None) -> None:
        """Report to all guards how a call ended, and settle its real cost."""
        # Emptied first, so that an error below cannot make the call leave twice.
        endpoint, held.endpoint = held.endpoint, ""
        if not endpoint:
            return
        assert held.question is not None
        bill = self._bill_of(held, error)
        with ExitStack() as each:  # each step is made, in reverse order, even if another raises
            each.callback(
                metrics.count_end,
                model=held.question.model,
                endpoint=endpoint,
                answer=held.answer,
                error=error,
                bill=bill,
            )
            if isinstance(error, RateLimited):
                each.callback(self._hold, held, endpoint, error.retry_after_s)
            each.callback(self._settle_limit, held, error, bill)
            if held.permit is not None:
                each.callback(held.permit.release, error)  # unless `_settle` has done it
            each.callback(self._settle, held, endpoint, bill, error)
            breaker = self._pool.breaker(endpoint)
            if held.admission is not None and breaker is not None:
                each.callback(breaker.ended, held.admission, _fault_of_endpoint(error))
            each.callback(self._pool.router.ended, endpoint)

    def _bill_of(self, held: HeldCall, error: BaseException | None) -> Bill:
        """Return what a call is charged: its usage if that is known, or else what was reserved.

        An error status costs nothing, unless the error ended an answer.  If the provider may have
        made an answer that was lost on its way through a gateway, the call costs its prompt.
        """
        assert held.question is not None
        assert held.reserved is not None
        model, reserved = held.question.model, held.reserved
        if held.answer is not None:
            return self._pool.bill(model, held.answer.usage, reserved)
        usage = getattr(error, "usage", None)
        if isinstance(error, UnusableAnswer) or usage is not None:
            return self._pool.bill(model, usage or TokenUsage(), reserved)
        if isinstance(error, ProviderDown) and error.sent:
            prompt = TokenUsage(completion_tokens=0)
            return self._pool.bill(model, prompt, reserved)
        if isinstance(error, Denied | ProviderDown | ProviderRefused):
            return NOTHING
        return reserved

    def _settle(
        self, held: HeldCall, endpoint: str, bill: Bill, error: BaseException | None
    ) -> None:
        """Settle the cost, land the answer or give its flight to others, and give the permit back.

        It takes one round trip.  While Redis is away the charge stays as reserved, which is the
        safe side.
        """
        assert held.question is not None
        assert held.charge is not None
        model, pool, answer = held.question.model, self._pool, held.answer
        label = model if bill.amounts else ""
        calls: list[Call] = [self._budget.settling(held.charge.id, bill.amounts, label=label)]
        if answer is None:
            calls.append(pool.flights.abandoning(held.flight))
        else:
            calls.append(self._landing(held, codec.pack(msgspec.to_builtins(answer)), answer))
            calls += pool.health.answered(endpoint)
            if answer.usage.is_complete:
                calls.append(pool.learned.learning(model, self._answered(held, answer)))
        together(
            self._store, *calls, *(held.permit.releasing(error) if held.permit is not None else ())
        )

    def _answered(self, held: HeldCall, answer: Answer) -> AnsweredCall:
        """Return a call as later estimates know it."""
        assert held.question is not None
        return AnsweredCall(
            kind=self.kind,
            estimated=held.estimated,
            max_tokens=held.draft.max_tokens,
            answer=answer,
            priced=self._pool.price(held.question.model, answer.usage),
            has_form=held.draft.form is not None,
            is_repair=held.draft.is_repair,
            slot_s=self.pace.answered(answer.latency_s),
        )

    def _landing(self, held: HeldCall, packed: bytes, answer: Answer) -> Call:
        """Return the call that gives an answer to others, and keeps it for its item."""
        self.memos.append((held.index, held.flight.key))
        return self._pool.flights.landing(
            held.flight,
            packed,
            memo=memo_of(self._spec, held.index),
            memo_ttl_s=MEMO_S,
            cache_ttl_s=_cache_s(self._spec, held, answer),
        )

    def _settle_limit(self, held: HeldCall, error: BaseException | None, bill: Bill) -> None:
        """Settle the rate limit to the tokens used, where they are known."""
        assert held.grant is not None
        if isinstance(error, ProviderRefused) and error.code == "REQUEST_TOO_LARGE":
            held.grant.settle(tokens=0, bytes=0)  # a limit cannot have counted a call above it
            return
        usage = held.answer.usage if held.answer is not None else getattr(error, "usage", None)
        if usage is None:
            return  # the reserved amount stays taken, which keeps the limit
        used = bill.amounts["tokens"]
        if held.answer is not None and not usage.is_complete:
            # The budget counts what was reserved; for the limit an estimate is close enough.
            used = min(used, held.estimated * MARGIN + estimated_tokens(held.answer.text))
        held.grant.settle(tokens=used, bytes=used * BYTES_PER_TOKEN)

    def _hold(self, held: HeldCall, endpoint: str, wait_s: float) -> None:
        """Pause the limits of a model and key, because the provider asked for it."""
        assert held.question is not None
        self._pool.hold(self._pool.endpoints[endpoint], held.question.model, wait_s)

    def keep(self, held: HeldCall, answer: Answer) -> None:
        """Keep the answer of another caller in the item's memo, and in the cache."""
        with suppress(StoreUnavailable):
            self._store.call(self._landing(held, held.flight.value, answer), on_outage="patient")


def _fault_of_endpoint(error: BaseException | None) -> BaseException | None:
    """Return the error that the breaker of an endpoint counts; None if the endpoint answered."""
    if not isinstance(error, ProviderRefused) or not error.status:  # 0: nothing was sent
        return error
    return None if error.category is Category.VALIDATION else error


def _cache_s(spec: JobSpec, held: HeldCall, answer: Answer) -> float:
    """Return the seconds for which others find the answer; 0 if it is not a full one."""
    return spec.cache_ttl_s if answer.model == held.model and not answer.fault else 0
