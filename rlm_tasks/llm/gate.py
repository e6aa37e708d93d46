"""The guards of a call to a model: single flight, budget, rate limit and breaker of an endpoint.

The engine enters and leaves a `Gate` as it does the guards of any operation; the operation awaits
`Gate.reply`.  Other operations declare their guards; those of a model depend on each item's tier
and on the health of endpoints.  The order, outermost first:

- the deadline and retry, as for every item;
- *single flight* with memos and cache: an answer that is known or on its way costs nothing;
- the *budget* of the job;
- for one endpoint after the other, its *rate limit* and its *breaker*.

If an inner guard denies the call, the outer ones take their grants back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.bulkhead import URGENCY
from resilience.degradation import Strategy
from resilience.errors import BulkheadFull, Category, Denied, RateLimited, StoreUnavailable
from resilience.retry import RetryPolicy
from resilience.store import Call
from rlm_tasks.engine.guards import PATIENCE_S, OperationGuards, ProcessGuards
from rlm_tasks.jobs import codec
from rlm_tasks.ledger.budgets import account_of
from rlm_tasks.llm import metrics
from rlm_tasks.llm.draft import Draft, digest, models_for
from rlm_tasks.llm.endpoint_pool import EndpointPool
from rlm_tasks.llm.metrics import LLM_REFUSED, LLM_SHARED
from rlm_tasks.llm.process_memory import watch
from rlm_tasks.llm.structured_output import Misformed, parse
from rlm_tasks.llm.wire.answers import Answer, Question
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, UnusableAnswer
from rlm_tasks.operations.protection import Protection

if TYPE_CHECKING:
    from resilience.breaker_storage import Admission
    from resilience.bucket import Grant
    from resilience.budget import Charge
    from resilience.single_flight import Flight
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.operations.context import Context
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.settings.llm import EndpointSettings

MEMO_S = 3600.0
"""Seconds for which an item keeps its paid answer, in case it runs again before its node ends."""
SOON_S = 0.5
"""Seconds until a budget is read again that calls in flight may leave."""
LATER_S = 5.0
"""Seconds until the next try when no endpoint is healthy, or the budget is spent."""
MARGIN = 1.05
"""Factor on the estimate of a prompt; a provider that counts more than that answers 429."""
BYTES_PER_TOKEN = 4


class BudgetSpent(Denied):
    """The rest of a job's budget is less than a call may cost."""

    code = "BUDGET_SPENT"
    category = Category.QUOTA

    def __init__(self, guard: str, retry_after_s: float, why: str, *, final: bool = False) -> None:
        self.final = final  # the calls in flight cannot leave enough either
        super().__init__(guard, retry_after_s, why)


@dataclass(slots=True)
class HeldCall:
    """One call with the grants that it holds."""

    draft: Draft
    gate: Gate
    flight: Flight
    index: int  # number of its item
    model: str  # the model of its tier; another one may answer
    question: Question | None = None  # None: another call has the answer, or will have it
    endpoint: str = ""
    reserved: dict[str, float] = field(default_factory=dict)
    charge: Charge | None = None
    grant: Grant | None = None
    admission: Admission | None = None
    estimated: int = 0  # tokens of the prompt, without corrections from earlier calls
    answer: Answer | None = None


class Gate(OperationGuards):
    """The calls of one operation's items, for one job, in one process."""

    def __init__(
        self,
        guards: ProcessGuards,
        operation: Operation,
        spec: JobSpec,
        compose: Callable[[Any, dict[str, Any], str], Draft],
    ) -> None:
        attempts = guards.settings.llm.attempts
        about = Protection(
            operation.name,
            retry=RetryPolicy(max_attempts=attempts, retry_on=(UnusableAnswer,)),
            fallback=operation.protection.fallback,
        )
        super().__init__(
            operation,
            about,
            breaker=None,
            bucket=None,
            bulkhead=None,
            retry=guards.retry_of(operation.name, about),
            priority=spec.priority,
            urgency=URGENCY[spec.priority],
            store=guards.store,
        )
        self._guards, self._spec, self._compose = guards, spec, compose
        self._pool = guards.shared_part(_opened)
        guards.shared_part(watch)
        self._budget = guards.budgets.budget(spec.tree)
        self._memos: list[tuple[int, str]] = []

    # --- entering ------------------------------------------------------------------------------

    def enter(self, item: Any, context: Context, waiter: str) -> Any:
        """Take all grants of an item's first call, or none.

        Raises Denied with the time to come back.
        """
        context.entry = self._admit(
            self._compose(item, context.params, self._spec.complexity), context, waiter
        )
        return context.entry

    def _admit(self, draft: Draft, context: Context, waiter: str = "") -> HeldCall:
        pool = self._pool
        if pool.is_full:
            raise BulkheadFull("pool", PATIENCE_S, "this process has its limit of calls in flight")
        estimated = draft.estimated
        models = models_for(
            draft.tier,
            pool.settings,
            context.degradation,
            prompt=estimated,
            answer=draft.max_tokens,
        )
        question = draft.question(models[0])
        memo = self._memo(context.index)
        flight = pool.flights.begin(
            digest(question), cached=self._spec.cache_ttl_s > 0, memo=memo, by=memo
        )
        held = HeldCall(
            draft=draft,
            gate=self,
            flight=flight,
            index=context.index,
            model=models[0],
            estimated=estimated,
        )
        if flight.state != "mine":
            return held
        try:
            self._take_grants(held, models, context, waiter)
        except BaseException:
            self._give_back(held)
            raise
        return held

    def _memo(self, index: int) -> str:
        return f"{self._spec.job}:{index}"

    def _take_grants(
        self, held: HeldCall, models: Sequence[str], context: Context, waiter: str
    ) -> None:
        """Find a model and an endpoint whose guards allow the call now.  Raises Denied."""
        refused: Denied | None = None
        for model in models:
            held.question = held.draft.question(model)
            try:
                self._charge(held)
            except BudgetSpent:
                if model == held.model:
                    raise
                break  # a budget that pays no other model waits for the requested one
            if endpoints := self._pool.order(model, held.flight.key):
                try:
                    return self._take_first(held, endpoints, waiter, context)
                except Denied as denied:
                    refused = denied if refused is None else min(refused, denied, key=_wait_order)
                if refused.code != "CIRCUIT_OPEN":
                    break  # a full limit is waited for; only an open breaker leads to another model
            self._withdraw_charge(held)
        raise refused or Denied("endpoints", LATER_S, f"no healthy endpoint has {models[0]}")

    def _take_first(
        self, held: HeldCall, endpoints: Sequence[EndpointSettings], waiter: str, context: Context
    ) -> None:
        """Take the first endpoint whose guards allow the call now.

        If none does, the call joins the line of one endpoint: its place in a second line would only
        delay others.
        """
        assert held.question is not None
        refused: list[tuple[Denied, EndpointSettings]] = []
        in_line = len(endpoints) == 1
        for each in endpoints:
            try:
                return self._take_endpoint(held, each.name, waiter, context, in_line=in_line)
            except Denied as denied:
                refused.append((denied, each))
        soonest, endpoint = min(refused, key=lambda each: _wait_order(each[0]))
        if len(endpoints) > 1 and isinstance(soonest, RateLimited):
            return self._take_endpoint(held, endpoint.name, waiter, context, in_line=True)
        raise soonest

    def _charge(self, held: HeldCall) -> None:
        """Reserve the maximum cost of the call.

        Raises BudgetSpent.  Without a fallback, a spent budget also ends the items of the job.
        """
        assert held.question is not None
        most = held.draft.max_tokens
        held.reserved = self._pool.cost(
            held.question.model, _tokens_to_reserve(self._pool, held) - most, most
        )
        id = f"{self._memo(held.index)}:{held.flight.key}"
        try:
            charge = self._budget.charge(
                id, held.reserved, account=account_of(self._spec), again=held.flight.again
            )
            if (
                charge.state == "exhausted"
                and self._protection.fallback is None
                and held.question.model == held.model
            ):
                self._guards.stop(self._spec.job, "budget", detail=charge.limited_by)
        except StoreUnavailable:  # without counting, nothing may be spent
            raise Denied("budget", SOON_S, "Redis does not answer") from None
        if charge.state == "wait":
            raise BudgetSpent(
                "budget", SOON_S, f"calls in flight may leave enough {charge.limited_by}"
            )
        if charge.state == "exhausted":
            LLM_REFUSED.inc()
            raise BudgetSpent("budget", LATER_S, f"its {charge.limited_by} are spent", final=True)
        held.charge = charge

    def _take_endpoint(
        self, held: HeldCall, name: str, waiter: str, context: Context, *, in_line: bool
    ) -> None:
        """Take the rate limit and the breaker of one endpoint, or neither.  Raises Denied."""
        assert held.question is not None
        pool = self._pool
        if pool.router.in_flight[name] >= pool.settings.per_host:
            raise BulkheadFull(
                f"endpoint {name}",
                PATIENCE_S,
                f"{pool.settings.per_host} calls of this process are in flight",
            )
        bucket = pool.bucket(pool.endpoints[name], held.question.model)
        tokens = _tokens_to_reserve(self._pool, held)
        grant = bucket.reserve(
            priority=self._priority,
            in_line=context.rest if in_line else 0,
            returns=context.waited,
            requests=1,
            tokens=tokens,
            bytes=tokens * BYTES_PER_TOKEN,
        )
        if not grant:
            raise RateLimited(
                f"bucket {bucket.name}",
                grant.wait_s,
                f"its limit of {grant.limited_by} has no room yet for a call of up to "
                f"{tokens:,.0f} tokens",
            )
        try:
            breaker = pool.breaker(name)
            held.admission = breaker.admit(waiter, self._urgency) if breaker is not None else None
        except Denied:
            grant.settle(requests=0, tokens=0, bytes=0)
            raise
        held.grant, held.endpoint = grant, name
        pool.router.began(name)

    # --- leaving -------------------------------------------------------------------------------

    def _withdraw_charge(self, held: HeldCall) -> None:
        if held.charge is not None:
            self._budget.withdraw(held.charge.id)
            held.charge = None

    def _give_back(self, held: HeldCall) -> None:
        """Return the grants of a call that was not made."""
        self._withdraw_charge(held)
        self._pool.flights.abandon(held.flight)

    def leave(self, entry: Any, error: BaseException | None = None) -> None:
        """Report to all guards how a call ended, and settle its real cost."""
        held: HeldCall = entry
        # Emptied first, so that an error below cannot make the call leave twice.
        endpoint, held.endpoint = held.endpoint, ""
        if not endpoint:
            return
        self._pool.router.ended(endpoint)
        breaker = self._pool.breaker(endpoint)
        if held.admission is not None and breaker is not None:
            breaker.ended(held.admission, error)
        if held.answer is not None:
            self._settle(held, endpoint, held.answer)
        else:
            self._failed(held, endpoint, error)

    def _settle(self, held: HeldCall, endpoint: str, answer: Answer) -> None:
        """Settle the cost and publish the answer: one round trip, and one for the rate limit."""
        assert held.question is not None
        assert held.charge is not None
        assert held.grant is not None
        model, pool, memo = held.question.model, self._pool, self._memo(held.index)
        used = self._pool.cost(model, answer.prompt_tokens, answer.completion_tokens)
        lands = pool.flights.landing(
            held.flight,
            codec.pack(msgspec.to_builtins(answer)),
            memo=memo,
            memo_ttl_s=MEMO_S,
            cache_ttl_s=_cache_s(self._spec, held, answer),
        )
        self._memos.append((held.index, held.flight.key))
        metrics.count_answer(model, endpoint, answer, used["money"])
        with suppress(StoreUnavailable):  # the charge stays as reserved, which is the safe side
            self._store.call(
                lands,
                self._budget.settling(held.charge.id, used, label=model),
                pool.learned.learning(model, held.estimated, held.draft.max_tokens, answer),
                on_outage="patient",
            )
        held.grant.settle(tokens=used["tokens"], bytes=used["tokens"] * BYTES_PER_TOKEN)

    def _failed(self, held: HeldCall, endpoint: str, error: BaseException | None) -> None:
        """Settle the cost of a failed call, and give its flight to others.

        An answer that may have been lost is charged as reserved; an unusable answer costs its
        prompt.
        """
        assert held.question is not None
        assert held.charge is not None
        metrics.count_failure(held.question.model, endpoint, error)
        if isinstance(error, Denied | ProviderDown | ProviderRefused):
            self._withdraw_charge(held)
        else:
            prompt = _tokens_to_reserve(self._pool, held) - held.draft.max_tokens
            used = (
                self._pool.cost(held.question.model, prompt, 0)
                if isinstance(error, UnusableAnswer)
                else held.reserved
            )
            completion = used["tokens"] - prompt
            metrics.count_cost(held.question.model, prompt, completion, used["money"])
            self._budget.settle(held.charge.id, used, label=held.question.model)
        self._pool.flights.abandon(held.flight)
        if isinstance(error, RateLimited):
            self._pool.hold(
                self._pool.endpoints[endpoint], held.question.model, error.retry_after_s
            )

    def instead_of(self, error: Exception) -> Callable[..., Any] | None:
        """Return the fallback for a budget that is spent for good; None for other errors."""
        spent_for_good = isinstance(error, BudgetSpent) and error.final
        return self._protection.fallback if spent_for_good else None

    def still_waits(self, waiter: str) -> bool:
        """Return whether a waiter is still in the line of an endpoint's breaker."""
        breakers = [self._pool.breaker(name) for name in self._pool.endpoints]
        try:
            return any(
                self._store.call(
                    *(each.waits(waiter) for each in breakers if each is not None),
                    on_outage="patient",
                )
            )
        except StoreUnavailable:
            return True

    def forgetting(self, until: int) -> list[Call]:
        """Return the calls that drop the memos of items before `until`.

        The answers of these items are in a stored partial.
        """
        return self._pool.flights.forgetting(
            [(key, self._memo(index)) for index, key in self._memos if index < until]
        )

    # --- calling -------------------------------------------------------------------------------

    async def reply(self, context: Context) -> Any:
        """Return the answer to an item that has entered: its text, or the data of its form.

        An answer of the wrong form is sent back in a further call, which passes the same guards.
        Raises Misformed, the errors of the endpoint, and Denied when the item must come back.
        """
        held, repairs = context.entry, self._pool.settings.repairs
        answer = await self._call(held)
        while True:
            form = held.draft.form
            try:
                output = answer.text if form is None else parse(answer.text, form)
            except Misformed as wrong:
                if not repairs:
                    raise
                repairs -= 1
                repair = held.draft.repaired(answer.text, wrong.why)
                held, answer = await self._call_again(repair, context)
            else:
                context.degradation.shaped |= _shaped(held, answer)
                if repairs < self._pool.settings.repairs:
                    context.degradation.shaped.add(Strategy.REPAIRED_ANSWER)
                return output

    async def _call(self, held: HeldCall) -> Answer:
        if held.question is None:
            return await self._shared_answer(held)
        held.answer = await self._pool.endpoint(held.endpoint).ask(held.question)
        self._pool.learn(
            self._pool.endpoints[held.endpoint], held.question.model, held.answer.limits
        )
        self.leave(held)  # before the answer is used, which needs no grant
        return held.answer

    async def _shared_answer(self, held: HeldCall) -> Answer:
        """Wait for the answer of another caller.

        Raises Denied if that caller is gone, so that the item enters again.
        """
        while held.flight.state == "others":
            await asyncio.sleep(held.flight.wait_s)
            held.flight = self._pool.flights.look(held.flight)
        if held.flight.state == "mine":
            self._pool.flights.abandon(held.flight)
            raise Denied("flight", 0.0, "the caller that made the call is gone")
        answer = msgspec.convert(codec.unpack(held.flight.value), Answer)
        if held.flight.source == "flight":
            self._remember(held, answer)
        LLM_SHARED.inc(source=held.flight.source)
        return answer

    def _remember(self, held: HeldCall, answer: Answer) -> None:
        """Keep the answer of another caller in the item's memo, and in the cache."""
        flight = held.flight
        self._pool.flights.land(
            flight,
            flight.value,
            memo=self._memo(held.index),
            memo_ttl_s=MEMO_S,
            cache_ttl_s=_cache_s(self._spec, held, answer),
        )
        self._memos.append((held.index, flight.key))

    async def _call_again(self, draft: Draft, context: Context) -> tuple[HeldCall, Answer]:
        """Make another call for the same item, which waits as any other call does.

        Raises Denied for a longer wait.
        """
        while True:
            try:
                held = self._admit(draft, context)
                break
            except Denied as denied:
                if denied.retry_after_s > SOON_S:
                    raise
                await asyncio.sleep(denied.retry_after_s)
        try:
            return held, await self._call(held)
        except BaseException as error:
            self.leave(held, error)
            raise


def _opened(guards: ProcessGuards) -> EndpointPool:
    return EndpointPool(guards).open()


def _tokens_to_reserve(pool: EndpointPool, held: HeldCall) -> float:
    """Return the estimate of the prompt, and all of max_tokens."""
    assert held.question is not None  # a model has been chosen before
    ratio = pool.learned.of(held.question.model).prompt_ratio
    return round(held.estimated * ratio * MARGIN + held.draft.max_tokens)


def _cache_s(spec: JobSpec, held: HeldCall, answer: Answer) -> float:
    """Return the seconds for which others find the answer; 0 if another model gave it."""
    return spec.cache_ttl_s if answer.model == held.model else 0


def _shaped(held: HeldCall, answer: Answer) -> set[Strategy]:
    """Return the strategies by which an answer is less than was requested."""
    applied = {
        Strategy.OTHER_MODEL: answer.model != held.model,
        Strategy.CUT_ANSWER: answer.finish == "length",
    }
    return {strategy for strategy, is_applied in applied.items() if is_applied}


def _wait_order(denied: Denied) -> tuple[bool, float]:
    """Return the sort key of denials: the shortest wait first, open breakers after all others."""
    return denied.code == "CIRCUIT_OPEN", denied.retry_after_s
