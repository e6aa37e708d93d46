"""What a call to a model must pass: who else asks it, what it may cost, where it goes, when.

The guards of other operations are the operation's; those of a model follow from each item: from its
tier, and from which endpoints are well.  Order, outermost first: the deadline and retry (as for
every item), *single flight* with memos and cache (what is known or being asked costs nothing), the
*budget* of the job, then for one endpoint after the other its *rate limit* and *breaker*.  What an
inner one refuses is given back to the outer ones.  Refuses to know what is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.degradation import Strategy
from resilience.errors import BulkheadFull, Category, Denied, RateLimited, StoreUnavailable
from resilience.retry import RetryPolicy
from resilience.store import Call
from resilience.waiters import URGENCY
from rlm_tasks.engine.guards import PATIENCE_S, OperationGuards, ProcessGuards
from rlm_tasks.jobs import codec
from rlm_tasks.ledger.budgets import account_of
from rlm_tasks.llm import metrics
from rlm_tasks.llm.draft import Draft, digest, models_for
from rlm_tasks.llm.endpoint import Answer, ProviderDown, ProviderRefused, Question, UnusableAnswer
from rlm_tasks.llm.endpoint_pool import EndpointPool
from rlm_tasks.llm.metrics import LLM_REFUSED, LLM_SHARED
from rlm_tasks.llm.process_memory import watched
from rlm_tasks.llm.structured_output import Misformed, read
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
"""An answer that was paid for is known to its item for so long, should the item be done again
before its node has ended.
"""
SOON_S = 0.5
"""What calls in flight will leave of a budget is looked at again after this."""
ILL_S = 5.0
MARGIN = 1.05
"""A prompt is estimated this much larger than such prompts were: a provider that counts more
answers 429.
"""
BYTES_PER_TOKEN = 4


class BudgetSpent(Denied):
    """What is left of a job's budget is less than a call may cost."""

    code = "BUDGET_SPENT"
    category = Category.QUOTA

    def __init__(self, guard: str, retry_after_s: float, why: str, *, final: bool = False) -> None:
        self.final = final  # whatever the calls in flight will leave
        super().__init__(guard, retry_after_s, why)


@dataclass(slots=True)
class Pass:
    """What one call holds."""

    draft: Draft
    gate: Gate
    flight: Flight
    index: int  # of its item
    model: str  # that it is meant for
    question: Question | None = None  # None: somebody else asks it, or has asked
    endpoint: str = ""
    reserved: dict[str, float] = field(default_factory=dict)
    charge: Charge | None = None
    grant: Grant | None = None
    admission: Admission | None = None
    estimated: int = 0  # tokens of the prompt, before what was learned
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
        its = guards.settings.llm
        about = Protection(
            operation.name,
            retry=RetryPolicy(max_attempts=its.attempts, retry_on=(UnusableAnswer,)),
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
        self._provider = guards.shared_part(_ready)
        guards.shared_part(watched)
        self._budget = guards.budgets.budget(spec.tree)
        self._memos: list[tuple[int, str]] = []

    # --- entering ------------------------------------------------------------------------------

    def enter(self, item: Any, context: Context, waiter: str) -> Any:
        """Take what an item's first call needs, all or nothing.  Raises Denied, saying when to come
        back.
        """
        context.entry = self._admit(
            self._compose(item, context.params, self._spec.complexity), context, waiter
        )
        return context.entry

    def _admit(self, draft: Draft, context: Context, waiter: str = "") -> Pass:
        provider = self._provider
        if provider.is_full:
            raise BulkheadFull(
                "pool", PATIENCE_S, "as many calls of this process are in flight as may be"
            )
        estimated = draft.estimated
        models = models_for(
            draft.tier,
            provider.settings,
            context.degradation,
            prompt=estimated,
            answer=draft.max_tokens,
        )
        question = draft.question(models[0])
        memo = self._memo(context.index)
        flight = provider.flights.begin(
            digest(question), cached=self._spec.cache_ttl_s > 0, memo=memo, by=memo
        )
        held = Pass(
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
            self._go(held, models, context, waiter)
        except BaseException:
            self._give_back(held)
            raise
        return held

    def _memo(self, index: int) -> str:
        return f"{self._spec.job}:{index}"

    def _go(self, held: Pass, models: Sequence[str], context: Context, waiter: str) -> None:
        """Find a model and an endpoint that take the call now."""
        refused: Denied | None = None
        for model in models:
            held.question = held.draft.question(model)
            try:
                self._charge(held)
            except BudgetSpent:
                if model == held.model:
                    raise
                break  # what cannot pay for another model waits for its own
            if places := self._provider.order(model, held.flight.key):
                try:
                    return self._somewhere(held, places, waiter, context)
                except Denied as denied:
                    refused = denied if refused is None else min(refused, denied, key=_how_bad)
                if refused.code != "CIRCUIT_OPEN":
                    break  # it waits for its turn rather than go to another model
            self._withdraw_charge(held)
        raise refused or Denied("endpoints", ILL_S, f"none is well that has {models[0]}")

    def _somewhere(
        self, held: Pass, places: Sequence[EndpointSettings], waiter: str, context: Context
    ) -> None:
        """Take the first endpoint that takes the call now; where none does, stand in one line: a
        second would stand still.
        """
        assert held.question is not None
        refused: list[tuple[Denied, EndpointSettings]] = []
        for place in places:
            try:
                return self._through(held, place.name, waiter, context, in_line=len(places) == 1)
            except Denied as denied:
                refused.append((denied, place))
        soonest, place = min(refused, key=lambda each: _how_bad(each[0]))
        if len(places) > 1 and isinstance(soonest, RateLimited):
            return self._through(held, place.name, waiter, context, in_line=True)
        raise soonest

    def _tokens(self, held: Pass) -> float:
        assert held.question is not None  # it is asked when a model has been chosen
        ratio = self._provider.learned.of(held.question.model).prompt_ratio
        return round(held.estimated * ratio * MARGIN + held.draft.max_tokens)

    def _cost(self, model: str, prompt: float, completion: float) -> dict[str, float]:
        its = self._provider.settings.model(model)
        money = (prompt * its.input_price + completion * its.output_price) / 1e6
        return {"calls": 1.0, "tokens": float(prompt + completion), "money": money}

    def _charge(self, held: Pass) -> None:
        """Reserve what the call may cost.  Raises BudgetSpent; where nothing else can be done it
        ends the job's items.
        """
        assert held.question is not None
        most = held.draft.max_tokens
        held.reserved = self._cost(held.question.model, self._tokens(held) - most, most)
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
        except StoreUnavailable:  # what cannot be counted is not spent
            raise Denied("budget", SOON_S, "Redis does not answer") from None
        if charge.state == "wait":
            raise BudgetSpent(
                "budget", SOON_S, f"calls in flight may leave enough {charge.limited_by}"
            )
        if charge.state == "exhausted":
            LLM_REFUSED.inc()
            raise BudgetSpent("budget", ILL_S, f"its {charge.limited_by} are spent", final=True)
        held.charge = charge

    def _through(
        self, held: Pass, name: str, waiter: str, context: Context, *, in_line: bool
    ) -> None:
        """Take the rate limit and the breaker of one endpoint, or neither."""
        assert held.question is not None
        provider, place = self._provider, self._provider.places[name]
        if provider.router.in_flight[name] >= provider.settings.per_host:
            raise BulkheadFull(
                f"endpoint {name}",
                PATIENCE_S,
                f"{provider.settings.per_host} calls of this process are in flight",
            )
        bucket, tokens = provider.bucket(place, held.question.model), self._tokens(held)
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
                f"its limit of {grant.limited_by} has no room yet for a call of up to {tokens:,.0f} tokens",
            )
        try:
            breaker = provider.breaker(name)
            held.admission = breaker.admit(waiter, self._urgency) if breaker is not None else None
        except Denied:
            grant.settle(requests=0, tokens=0, bytes=0)
            raise
        held.grant, held.endpoint = grant, name
        provider.router.began(name)

    # --- leaving -------------------------------------------------------------------------------

    def _withdraw_charge(self, held: Pass) -> None:
        if held.charge is not None:
            self._budget.withdraw(held.charge.id)
            held.charge = None

    def _give_back(self, held: Pass) -> None:
        """Nothing was called."""
        self._withdraw_charge(held)
        self._provider.flights.abandon(held.flight)

    def leave(self, entry: Any, error: BaseException | None = None) -> None:
        """Tell everybody how a call ended; what it has really used is settled."""
        held: Pass = entry
        endpoint, held.endpoint = (
            held.endpoint,
            "",
        )  # first: whatever goes wrong below, it is left once
        if not endpoint:
            return
        self._provider.router.ended(endpoint)
        breaker = self._provider.breaker(endpoint)
        if held.admission is not None and breaker is not None:
            breaker.ended(held.admission, error)
        if held.answer is not None:
            self._settle(held, endpoint, held.answer)
        else:
            self._failed(held, endpoint, error)

    def _settle(self, held: Pass, endpoint: str, answer: Answer) -> None:
        """Pay, and let those know who wait for the answer: one round trip, and one for the rate
        limit.
        """
        assert held.question is not None
        assert held.charge is not None
        assert held.grant is not None
        model, its, memo = held.question.model, self._provider, self._memo(held.index)
        used = self._cost(model, answer.prompt_tokens, answer.completion_tokens)
        lands = its.flights.landing(
            held.flight,
            codec.pack(msgspec.to_builtins(answer)),
            memo=memo,
            memo_ttl_s=MEMO_S,
            cache_ttl_s=self._cache_s(held, answer),
        )
        self._memos.append((held.index, held.flight.key))
        metrics.answered(model, endpoint, answer, used["money"])
        with suppress(StoreUnavailable):  # it stays charged as it was reserved: the safe side
            self._store.call(
                lands,
                self._budget.settling(held.charge.id, used, label=model),
                its.learned.learning(model, held.estimated, held.draft.max_tokens, answer),
                on_outage="answer",
            )
        held.grant.settle(tokens=used["tokens"], bytes=used["tokens"] * BYTES_PER_TOKEN)

    def _cache_s(self, held: Pass, answer: Answer) -> float:
        """Return for how long others find an answer; another model's is none to what they ask."""
        return self._spec.cache_ttl_s if answer.model == held.model else 0

    def _failed(self, held: Pass, endpoint: str, error: BaseException | None) -> None:
        """Give the flight to others.  What a provider may have answered unheard is paid as
        reserved, garbage by its prompt.
        """
        assert held.question is not None
        assert held.charge is not None
        metrics.failed(held.question.model, endpoint, error)
        if isinstance(error, Denied | ProviderDown | ProviderRefused):
            self._withdraw_charge(held)
        else:
            prompt = self._tokens(held) - held.draft.max_tokens
            used = (
                self._cost(held.question.model, prompt, 0)
                if isinstance(error, UnusableAnswer)
                else held.reserved
            )
            metrics.paid(held.question.model, prompt, used["tokens"] - prompt, used["money"])
            self._budget.settle(held.charge.id, used, label=held.question.model)
        self._provider.flights.abandon(held.flight)
        if isinstance(error, RateLimited):
            self._provider.hold(
                self._provider.places[endpoint], held.question.model, error.retry_after_s
            )

    def instead_of(self, denied: Denied) -> Callable[..., Any] | None:
        """Return what is done without a model, when the budget is spent for good."""
        return (
            self._protection.fallback if isinstance(denied, BudgetSpent) and denied.final else None
        )

    def still_waits(self, waiter: str) -> bool:
        """Say whether a waiter that was noted is still in line at some endpoint's breaker."""
        breakers = [self._provider.breaker(name) for name in self._provider.places]
        try:
            return any(
                self._store.call(
                    *(each.waits(waiter) for each in breakers if each is not None),
                    on_outage="answer",
                )
            )
        except StoreUnavailable:
            return True

    def forgetting(self, until: int) -> list[Call]:
        """Return what drops the memos of items that are safe in their node's partial: those before
        `until`.
        """
        return self._provider.flights.forgetting(
            [(key, self._memo(index)) for index, key in self._memos if index < until]
        )

    # --- asking --------------------------------------------------------------------------------

    async def reply(self, context: Context) -> Any:
        """Return the answer to an item that was let in: its text, or what its form makes of it.

        An answer of the wrong form is sent back, and that call passes what the first one did.
        Raises Misformed, what the endpoint raises, and Denied when it has to come back."""
        held, repairs = context.entry, self._provider.settings.repairs
        answer = await self._ask(held)
        while True:
            try:
                output = (
                    answer.text if held.draft.form is None else read(answer.text, held.draft.form)
                )
            except Misformed as wrong:
                if not repairs:
                    raise
                repairs -= 1
                held, answer = await self._further(
                    held.draft.repaired(answer.text, wrong.why), context
                )
            else:
                context.degradation.shaped |= _less(held, answer)
                return output

    async def _ask(self, held: Pass) -> Answer:
        if held.question is None:
            return await self._landed(held)
        held.answer = await self._provider.endpoint(held.endpoint).ask(held.question)
        self._provider.learn(
            self._provider.places[held.endpoint], held.question.model, held.answer.told
        )
        self.leave(held)  # now: what comes of the answer holds nothing
        return held.answer

    async def _landed(self, held: Pass) -> Answer:
        """Wait for a call that somebody else makes.  Raises Denied when that one is gone: the item
        enters again.
        """
        while held.flight.state == "others":
            await asyncio.sleep(held.flight.wait_s)
            held.flight = self._provider.flights.look(held.flight)
        if held.flight.state == "mine":
            self._provider.flights.abandon(held.flight)
            raise Denied("flight", 0.0, "who made the call is gone")
        answer = msgspec.convert(codec.unpack(held.flight.value), Answer)
        if held.flight.source == "flight":
            self._remember(held, answer)
        LLM_SHARED.inc(source=held.flight.source)
        return answer

    def _remember(self, held: Pass, answer: Answer) -> None:
        """Keep another's answer for the item, should that be done again, and for those who ask for
        what is kept.
        """
        its = held.flight
        self._provider.flights.land(
            its,
            its.value,
            memo=self._memo(held.index),
            memo_ttl_s=MEMO_S,
            cache_ttl_s=self._cache_s(held, answer),
        )
        self._memos.append((held.index, its.key))

    async def _further(self, draft: Draft, context: Context) -> tuple[Pass, Answer]:
        """Make another call for the same item; it waits among the others for its turn, or comes
        back.
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
            return held, await self._ask(held)
        except BaseException as error:
            self.leave(held, error)
            raise


def _ready(guards: ProcessGuards) -> EndpointPool:
    return EndpointPool(guards).open()


def _less(held: Pass, answer: Answer) -> set[Strategy]:
    """Return in what an answer is less than what was asked for."""
    found = {
        Strategy.OTHER_MODEL: answer.model != held.model,
        Strategy.CUT_ANSWER: answer.finish == "length",
    }
    return {strategy for strategy, is_so in found.items() if is_so}


def _how_bad(denied: Denied) -> tuple[bool, float]:
    """Order refusals: the one to wait for is the soonest; that an endpoint is away counts only when
    all are.
    """
    return denied.code == "CIRCUIT_OPEN", denied.retry_after_s
