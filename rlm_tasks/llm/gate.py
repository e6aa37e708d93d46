"""The guards of a call to a model: single flight, budget, and the guards of an endpoint.

The engine enters and leaves a `Gate` as it does the guards of any operation; the operation awaits
`Gate.reply`.  Other operations declare their guards; those of a model depend on each item's tier
and on the health of endpoints.  The order, outermost first:

- the deadline and retry, as for every item;
- *single flight* with memos and cache: an answer that is known or on its way costs nothing;
- the *budget* of the job;
- for one endpoint after the other, its *rate limit*, its *breaker*, and a *permit* of its bulkhead.

If an inner guard denies the call, the outer ones take their grants back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.bulkhead import ASK_AGAIN_S, URGENCY
from resilience.degradation import Strategy
from resilience.errors import BulkheadFull, Category, Denied, RateLimited, StoreUnavailable
from resilience.retry import RetryPolicy
from resilience.store import Call, together
from rlm_tasks.engine.guards import PATIENCE_S, OperationGuards, ProcessGuards, line_of
from rlm_tasks.jobs import codec
from rlm_tasks.ledger.budgets import account_of
from rlm_tasks.llm.draft import Draft, digest, models_for
from rlm_tasks.llm.endpoint_pool import BYTES_PER_TOKEN, EndpointPool
from rlm_tasks.llm.metrics import LLM_REFUSED, LLM_SHARED
from rlm_tasks.llm.process_memory import watch
from rlm_tasks.llm.settlement import HeldCall, Settlement, memo_of
from rlm_tasks.llm.structured_output import Misformed, parse
from rlm_tasks.llm.wire.answers import Answer
from rlm_tasks.llm.wire.errors import NoAnswerText, UnusableAnswer
from rlm_tasks.operations.protection import Protection

if TYPE_CHECKING:
    from resilience.breaker_storage import Admission
    from resilience.bulkhead import Bulkhead, Permit
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.operations.context import Context
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.settings.llm import EndpointSettings

SOON_S = 0.5
"""Seconds until a budget is read again that calls in flight may leave."""
LATER_S = 5.0
"""Seconds until the next try when no endpoint is healthy, or the budget is spent."""


class BudgetSpent(Denied):
    """The rest of a job's budget is less than a call may cost."""

    code = "BUDGET_SPENT"
    category = Category.QUOTA
    when = "Earlier calls of the job have used its `budget` up."
    remedy = "Submit the rest with a larger budget."

    def __init__(self, guard: str, retry_after_s: float, why: str, *, final: bool = False) -> None:
        self.final = final  # the calls in flight cannot leave enough either
        super().__init__(guard, retry_after_s, why)


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
            retry=guards.retry_of(
                operation.name, about, asked_most_s=guards.settings.llm.hold_most_s
            ),
            priority=spec.priority,
            urgency=URGENCY[spec.priority],
            store=guards.store,
        )
        self._guards, self._spec, self._compose = guards, spec, compose
        self._pool = guards.shared_part(_opened)
        guards.shared_part(watch)
        self._budget = guards.budgets.budget(spec.tree)
        self._settlement = Settlement(self._pool, self._budget, spec, guards.store)

    # --- entering ------------------------------------------------------------------------------

    def enter(self, item: Any, context: Context, waiter: str) -> Any:
        """Take all grants of an item's first call, or none.

        Raises Denied with the time to come back.
        """
        draft = self._compose(item, context.params, self._spec.complexity)
        try:
            context.entry = self._admit(draft, context, waiter)
        except Denied as denied:
            self._settlement.pace.denied(denied)
            raise
        self._settlement.pace.entered()
        return context.entry

    def _admit(self, draft: Draft, context: Context, waiter: str = "") -> HeldCall:
        pool = self._pool
        if pool.is_full:
            raise BulkheadFull("pool", PATIENCE_S, "this process has its limit of calls in flight")
        if (context.beside or not waiter) and (full := pool.full()) is not None:
            raise _full(full)
        estimated = draft.estimated
        models = models_for(
            draft.tier,
            pool.settings,
            context.degradation,
            prompt=estimated,
            answer=draft.max_tokens,
        )
        key, memo = digest(draft.question(models[0])), memo_of(self._spec, context.index)
        flight = pool.flights.begin(
            self._flight_key(draft, key, memo),
            cached=self._spec.cache_ttl_s > 0,
            memo=memo,
            by=memo,
        )
        held = HeldCall(
            draft=draft,
            reply=self.reply,
            flight=flight,
            index=context.index,
            model=models[0],
            digest=key,
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

    def _flight_key(self, draft: Draft, digest: str, memo: str) -> str:
        """Return the key of the calls that may share one answer.

        Above temperature 0 the answers to equal questions differ, so each item asks for its own,
        unless the request caches answers.
        """
        shared = draft.temperature == 0 or self._spec.cache_ttl_s > 0
        own = "" if shared else f":{memo}"
        return f"{digest}{own}#{draft.sample}" if draft.sample else f"{digest}{own}"

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
            if endpoints := self._pool.order(model, held.digest):
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
        held.reserved = reserved = self._pool.most(
            held.question.model, held.draft, self._settlement.kind
        )
        id = f"{memo_of(self._spec, held.index)}:{held.flight.key}"
        try:
            charge = self._budget.charge(
                id, reserved.amounts, account=account_of(self._spec), again=held.flight.again
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
        """Take the rate limit, breaker and permit of one endpoint, or nothing.  Raises Denied."""
        assert held.question is not None
        assert held.reserved is not None
        pool = self._pool
        if pool.router.in_flight[name] >= pool.settings.per_host:
            raise BulkheadFull(
                f"endpoint {name}",
                PATIENCE_S,
                f"{pool.settings.per_host} calls of this process are in flight",
            )
        bucket = pool.bucket(pool.endpoints[name], held.question.model)
        tokens = held.reserved.amounts["tokens"]
        reserving = bucket.reserving(
            priority=self._priority,
            in_line=context.rest if in_line else 0,
            returns=context.waited,
            requests=1,
            tokens=tokens,
            bytes=tokens * BYTES_PER_TOKEN,
        )
        bulkhead = pool.bulkhead(name)
        permits = (
            []
            if bulkhead is None
            else [bulkhead.taking(waiter=line_of(context, waiter), urgency=self._urgency)]
        )
        # One round trip: a grant that the next guard makes useless is given back, which is rare.
        grant, *taken = together(self._store, reserving, *permits)
        try:
            if not grant:
                why = (
                    f"its limit of {grant.limited_by} has no room yet for a call of up to "
                    f"{tokens:,.0f} tokens"
                )
                raise bucket.denied(grant, why, waiter=waiter, urgency=self._urgency)
            held.admission = self._admission(name, waiter, taken)
        except Denied:
            if grant:
                grant.settle(requests=0, tokens=0, bytes=0)
            for permit in taken:
                permit.withdraw()
            raise
        pool.passed(bucket)
        held.grant, held.permit, held.endpoint = grant, next(iter(taken), None), name
        pool.router.began(name)

    def _admission(self, name: str, waiter: str, permits: Sequence[Permit]) -> Admission | None:
        """Return the admission of an endpoint's breaker, None without a breaker.

        Raises Denied, also for a permit that was denied.
        """
        breaker, bulkhead = self._pool.breaker(name), self._pool.bulkhead(name)
        admission = breaker.admit(waiter, self._urgency) if breaker is not None else None
        if bulkhead is not None and not all(permits):
            if breaker is not None and admission is not None:
                breaker.withdraw(admission)
            raise _full(bulkhead, *permits)
        return admission

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
        self._settlement.leave(entry, error)

    def instead_of(self, error: Exception) -> Callable[..., Any] | None:
        """Return the fallback for a budget that is spent for good; None for other errors."""
        spent_for_good = isinstance(error, BudgetSpent) and error.final
        return self._protection.fallback if spent_for_good else None

    def still_waits(self, waiter: str) -> bool:
        """Return whether a waiter is still in the line of an endpoint's guards."""
        try:
            return any(self._store.call(*self._pool.lines(waiter), on_outage="patient"))
        except StoreUnavailable:
            return True

    def forgetting(self, until: int) -> list[Call]:
        """Return the calls that drop the memos of items before `until`.

        The answers of these items are in a stored partial.
        """
        return self._pool.flights.forgetting(
            [
                (key, memo_of(self._spec, index))
                for index, key in self._settlement.memos
                if index < until
            ]
        )

    # --- calling -------------------------------------------------------------------------------

    async def reply(self, context: Context) -> Any:
        """Return the answer to an item that has entered: its text, or the data of its form.

        For several samples it is a list of answers.  Raises NoAnswerText, Misformed, the errors of
        the endpoint, and Denied when the item must come back.
        """
        held: HeldCall = context.entry
        if held.draft.samples == 1:
            return await self._output(held, context)
        others = [replace(held.draft, sample=number) for number in range(1, held.draft.samples)]
        outputs = await asyncio.gather(
            self._output(held, context),
            *(self._another_sample(each, context) for each in others),
            return_exceptions=True,  # a paid answer lands, also if another sample fails
        )
        failures = [each for each in outputs if isinstance(each, BaseException)]
        if failures:
            raise min(failures, key=lambda each: isinstance(each, Denied))
        return outputs

    async def _another_sample(self, draft: Draft, context: Context) -> Any:
        return await self._output(await self._admit_again(draft, context), context)

    async def _output(self, held: HeldCall, context: Context) -> Any:
        """Make a call, and return the text or the data of its answer.

        An answer of the wrong form is sent back in a further call, which passes the same guards;
        not one that max_tokens cut.
        """
        repairs = self._pool.settings.repairs
        answer = await self._call(held)
        while True:
            form = held.draft.form
            try:
                output = answer.text if form is None else parse(answer.text, form)
            except Misformed as wrong:
                if answer.finish == "content_filter":
                    raise NoAnswerText(answer.model, "CONTENT_FILTERED") from None
                if answer.finish == "length":  # a repair would be cut, too
                    why = f"max_tokens cut it at {held.draft.max_tokens}; set a larger max_tokens"
                    raise Misformed(why) from None
                if not repairs:
                    raise
                repairs -= 1
                repair = held.draft.repaired(answer.text, wrong.why)
                held = await self._admit_again(repair, context)
                answer = await self._call(held)
            else:
                context.degradation.shaped |= _shaped(held, answer)
                if repairs < self._pool.settings.repairs:
                    context.degradation.shaped.add(Strategy.REPAIRED_ANSWER)
                return output

    async def _call(self, held: HeldCall) -> Answer:
        """Return the answer of a call that has its guards.  Raises as `reply` does."""
        try:
            if held.question is None:
                answer = await self._shared_answer(held)
            else:
                held.answer = answer = await self._pool.endpoint(held.endpoint).ask(held.question)
                endpoint = self._pool.endpoints[held.endpoint]
                self._pool.learn(endpoint, held.question.model, answer.limits)
        except RateLimited as refused:
            self.leave(held, refused)
            # The pause is the bucket's from now on: the item asks again, and joins its line.
            raise RateLimited(refused.guard, 0.0, refused.why) from None
        except BaseException as error:
            self.leave(held, error)
            raise
        self.leave(held)  # before the answer is used, which needs no grant
        if answer.fault:
            raise NoAnswerText(answer.model, answer.fault, answer.finish)
        if answer.finish == "content_filter" and held.draft.fails_filtered:
            raise NoAnswerText(answer.model, "CONTENT_FILTERED")
        return answer

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
            self._settlement.keep(held, answer)
        LLM_SHARED.inc(source=held.flight.source)
        return answer

    async def _admit_again(self, draft: Draft, context: Context) -> HeldCall:
        """Take the guards of another call for the same item, which waits as any other call does.

        Raises Denied for a longer wait.
        """
        while True:
            try:
                return self._admit(draft, context)
            except Denied as denied:
                if denied.retry_after_s > SOON_S:
                    raise
                await asyncio.sleep(denied.retry_after_s)


def _opened(guards: ProcessGuards) -> EndpointPool:
    return EndpointPool(guards).open()


def _full(bulkhead: Bulkhead, permit: Permit | None = None) -> BulkheadFull:
    """Return the error for a limit of calls in flight, with the wait of a denied permit.

    A call that stands in no line asks again soon, because any call may end.
    """
    noted = permit is not None and permit.noted
    endpoint, limit = bulkhead.name.removeprefix("llm:"), int(bulkhead.limit)
    return BulkheadFull(
        f"bulkhead {bulkhead.name}",
        permit.wait_s if permit is not None and noted else ASK_AGAIN_S,
        f"the endpoint {endpoint} has its limit of {limit:,} call{'s' * (limit > 1)} in flight",
        noted=noted,
    )


def _shaped(held: HeldCall, answer: Answer) -> set[Strategy]:
    """Return the strategies by which an answer is less than was requested."""
    applied = {
        Strategy.OTHER_MODEL: answer.model != held.model,
        Strategy.CUT_ANSWER: answer.finish == "length",
        Strategy.FILTERED_ANSWER: answer.finish == "content_filter",
    }
    return {strategy for strategy, is_applied in applied.items() if is_applied}


def _wait_order(denied: Denied) -> tuple[bool, float]:
    """Return the sort key of denials: the shortest wait first, open breakers after all others."""
    return denied.code == "CIRCUIT_OPEN", denied.retry_after_s
