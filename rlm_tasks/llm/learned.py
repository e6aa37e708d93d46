"""The tokens and seconds of earlier calls to models, over all workers, for estimates.

`settlement` adds each answer.  `endpoint_pool` estimates the prompts that it reserves, and plans
estimate whole jobs.  Redis holds the sums of three kinds of calls: all calls to a model, those
of an operation, and those with the same params.  The sums of a narrower kind correct
those of a wider one.  A process reads them at most every 10 s.  Begin with `CallStatistics`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import redis

from resilience.connections import RecordUnreadable
from resilience.errors import BulkheadFull, Denied, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import readable
from rlm_tasks.llm.wire.answers import Answer

HALVE_AT = 1000
"""After this number of calls all sums are halved, so about the last thousand calls count."""
TTL_S = 30 * 24 * 3600
TTL_PER_CALL_S = 3600
"""The sums of one template are kept for an hour for each of its calls, at most TTL_S."""
READ_EVERY_S = 10.0
KEPT = 256
"""Kinds of calls whose sums a process keeps."""

# --- before the first call --------------------------------------------------------------------

FIRST_SLOPE = 1.1
"""Tokens of a prompt for each estimated token.

A reservation that is a little too large is settled later; one that is too small ends in a 429."""
MOST_MARKUP = 100.0
"""A bill above this many times our price is taken for this many times; later calls heal it."""
FIRST_OVERHEAD = 7.0
"""Tokens around a prompt: OpenAI counts 3 for a message, 1 for its role and 3 for the answer's
start (OpenAI cookbook, "How to count tokens with tiktoken")."""
FIRST_SECONDS = 2.0
FIRST_SPREAD = 0.3
"""Standard deviation of the slope among models, as a share of it."""
FIRST_SLOT_S = 0.01
"""Seconds of a slot that one call takes beside the wait for its answer, measured on two cores."""

# --- from one kind of calls to another --------------------------------------------------------

PRIOR = 4.0
"""The figures of the wider kind count as this number of calls."""
LONG = 250.0
"""Half of these PRIOR calls have at least this estimate.

So a few short prompts do not change the slope, which long ones need."""
FEW = 5
"""Below this number of calls of its own kind, a prompt reserves at least the first estimate."""
SPREAD_OF_PROMPTS = 0.25
"""Standard deviation of the tokens per estimated token among templates, as a share of them."""
SPREAD_OF_ANSWERS = 0.6
"""The same of the mean lengths of answers."""
LEAST_SPREAD = 0.02
"""The part of both that remains after any number of calls."""
LEAST_SLOPE, MOST_SLOPE, MOST_OVERHEAD = 0.05, 8.0, 100_000.0
"""A line outside these does not come from texts: its sums are damaged."""
KNOWN_WELL = 20
"""With this number of calls, a count far from the line changes the sums only in part."""
LINE_SUMS = ("inverse", "estimates", "tokens", "ratios", "squares")
"""Over all prompts of x estimated and y real tokens: 1/x, x, y, y/x and y * y/x."""
_LEARN = Script.load("rlm_tasks.llm", "learn")

Sums = Mapping[str, float]


class CallKind(NamedTuple):
    """Calls that are alike: those of an operation, with the same params."""

    operation: str = ""
    template: str = ""  # digest of the params

    @classmethod
    def of(cls, operation: str, params: Mapping[str, Any]) -> CallKind:
        """Return the kind of an operation's calls; a question differs without changing it."""
        same = {name: value for name, value in params.items() if name != "question"}
        text = json.dumps(same, sort_keys=True, default=str)
        return cls(operation, hashlib.blake2b(text.encode("utf-8", "replace")).hexdigest()[:16])


ANY = CallKind()
"""All calls to a model."""


# --- tokens of a prompt -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptLine:
    """The tokens of a prompt: `overhead + slope * estimated`.

    The line is fitted by least squares, and each call has the weight 1 / estimated.  With this
    weight, long prompts do not outweigh short ones, and the line meets the sum of all prompts.  A
    noise of 1 means a standard deviation of sqrt(estimated) tokens.
    """

    overhead: float = FIRST_OVERHEAD
    slope: float = FIRST_SLOPE
    noise: float = 1.0

    def tokens(self, estimated: float) -> float:
        """Return the expected tokens of a prompt."""
        return self.overhead + self.slope * max(0.0, estimated)

    def corrected(self, sums: Sums) -> PromptLine:
        """Return the line of narrower calls; this one counts as PRIOR calls around their mean."""
        calls = sums.get("prompts", 0.0)
        if not calls:
            return self._by_ratio(sums)
        mean, half = sums["estimates"] / calls, PRIOR / 2
        n, inverse, estimates = calls + PRIOR, sums["inverse"], sums["estimates"]
        tokens, ratios, squares = sums["tokens"], sums["ratios"], sums["squares"]
        for at in (mean / 2, max(mean * 2, LONG)):
            expected = self.tokens(at)
            inverse, estimates = inverse + half / at, estimates + half * at
            tokens, ratios = tokens + half * expected, ratios + half * expected / at
            squares += half * (expected**2 / at + self.noise**2)
        spread = inverse * estimates - n**2
        if not spread > 0:
            return self
        slope = (inverse * tokens - n * ratios) / spread
        overhead = (ratios - n * slope) / inverse
        if overhead < 0:
            overhead, slope = 0.0, tokens / estimates
        elif slope < LEAST_SLOPE:
            slope = LEAST_SLOPE
            overhead = (ratios - n * slope) / inverse
        noise = math.sqrt(max(0.0, squares - overhead * ratios - slope * tokens) / n)
        return self._if_possible(PromptLine(overhead, slope, noise))

    def _by_ratio(self, sums: Sums) -> PromptLine:
        """Return the line of sums that an earlier release has written."""
        if not (sums.get("estimated") and sums.get("prompt")):
            return self
        return self._if_possible(PromptLine(0.0, sums["prompt"] / sums["estimated"], self.noise))

    def _if_possible(self, line: PromptLine) -> PromptLine:
        possible = 0 <= line.overhead <= MOST_OVERHEAD and line.slope <= MOST_SLOPE
        return line if possible and line.slope >= LEAST_SLOPE * 0.99 else self


FIRST_LINE = PromptLine()


# --- all figures of a kind --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """Means and standard deviations of calls that are alike, or of wider kinds of calls."""

    calls: float = 0.0  # number of calls to the model behind the figures; older ones count less
    own: float = 0.0  # the part of them with the same template
    price_ratio: float = 1.0  # money that a gateway billed over that of our prices
    prompt: PromptLine = FIRST_LINE
    share: float = 0.5  # tokens of an answer over its max_tokens
    share_sd: float = 0.3
    answer: float | None = None  # tokens of an answer of other templates; None: not known
    seconds: float = FIRST_SECONDS
    seconds_sd: float = FIRST_SECONDS / 2
    slot_s: float = FIRST_SLOT_S  # seconds of a slot for each call, while no limit delays it
    repairs: float = 0.0  # repairs for each call with a form
    formed: float = 0.0  # calls with a form behind that

    def reserved(self, estimated: float) -> float:
        """Return the tokens to reserve for a prompt; it grows with the estimate."""
        tokens = self.prompt.tokens(estimated)
        return tokens if self.own >= FEW else max(tokens, FIRST_LINE.tokens(estimated))

    @property
    def prompt_spread(self) -> float:
        """The standard error of the mean tokens of prompts, as a share of them."""
        if not self.calls:
            return FIRST_SPREAD
        return LEAST_SPREAD + SPREAD_OF_PROMPTS * PRIOR / (PRIOR + self.own)

    @property
    def answer_spread(self) -> float:
        """The same of the mean tokens of answers."""
        return LEAST_SPREAD + SPREAD_OF_ANSWERS * PRIOR / (PRIOR + self.own)

    def answer_share(self, max_tokens: int) -> tuple[float, float]:
        """Return the mean tokens of an answer over max_tokens: as expected, and at the most.

        The answers of other templates are known by their share of max_tokens and by their tokens.
        Either may stay the same, so their geometric mean is expected.
        """
        share = min(1.0, self.share)
        if self.own or self.answer is None:
            return share, share
        other = min(1.0, self.answer / max_tokens)
        return math.sqrt(share * other), max(share, other)


def statistics_of(model: Sums, operation: Sums, template: Sums) -> CallStatistics:
    """Return the figures of a kind of calls from its sums, and from those of the wider kinds."""
    found = CallStatistics()
    for sums in (model, operation, template):
        found = _corrected(found, sums)
    own = template.get("calls", 0.0)
    return replace(found, calls=model.get("calls", 0.0) or found.calls, own=own)


def _corrected(wider: CallStatistics, sums: Sums) -> CallStatistics:
    """Return figures corrected by the sums of narrower calls; the wider ones count as a few."""
    calls, prompts = sums.get("calls", 0.0), sums.get("prompts", 0.0)
    if calls <= 0:
        return wider

    def mean(name: str, of: float, before: float, prior: float) -> float:
        return (sums.get(name, 0.0) + before * prior) / (of + prior) if of + prior else before

    def deviation(name: str) -> float:
        square = (sums.get(name, 0.0) / calls) ** 2
        return math.sqrt(max(0.0, sums.get(f"{name}2", 0.0) / calls - square))

    some = PRIOR if wider.calls else 0.0
    # The length of one answer of its own kind says more than those of many others.
    one, formed, priced = min(1.0, some), sums.get("formed", 0.0), sums.get("priced", 0.0)
    return replace(
        wider,
        calls=calls,
        price_ratio=sums.get("billed", 0.0) / priced if priced else wider.price_ratio,
        prompt=wider.prompt.corrected(sums),
        share=mean("share", calls, wider.share, one),
        share_sd=deviation("share"),
        answer=mean("answers", prompts, wider.answer or 0.0, one if wider.answer else 0.0)
        if prompts
        else wider.answer,
        seconds=mean("seconds", calls, wider.seconds, some),
        seconds_sd=deviation("seconds"),
        slot_s=mean("slot_s", sums.get("paced", 0.0), wider.slot_s, PRIOR),
        repairs=mean("repairs", formed, wider.repairs, min(PRIOR, wider.formed)),
        formed=formed or wider.formed,
    )


class SlotPace:
    """Measures the seconds that a slot takes for each call of a job, while no limit delays it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._waits = clock, False
        self._last: float | None = None  # time of the answer before

    def entered(self) -> None:
        """Note that a call has its guards."""
        self._waits = False

    def denied(self, denied: Denied) -> None:
        """Note why the slot could not begin another call."""
        if not isinstance(denied, BulkheadFull):  # it waits for a limit, which is no work
            self._waits, self._last = True, None

    def answered(self, latency_s: float) -> float | None:
        """Return the seconds since the answer before; None if a limit was waited for."""
        if self._waits:
            return None
        now, last = self._clock(), self._last
        self._last = now
        longest = max(1.0, 2 * latency_s)  # then the slot did something else
        return None if last is None else min(now - last, longest)


# --- in Redis ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnsweredCall:
    """One answered call, as it is added to the sums."""

    kind: CallKind
    estimated: int  # tokens of the prompt, without corrections from earlier calls
    max_tokens: int
    answer: Answer  # with complete usage
    priced: float = 0.0  # money of the answer by our prices
    has_form: bool = False
    is_repair: bool = False
    slot_s: float | None = None  # seconds since the answer before, unless a limit was waited for


class Learned:
    """The figures of all models of one platform."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._keys, self.clock = store, Keys(store.namespace), clock
        self._sums: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._read_at: dict[str, float] = {}

    def learning(self, model: str, call: AnsweredCall) -> Call:
        """Return the call to Redis that adds one answer, to share a round trip with others.

        This process knows the answer at once.
        """
        sums = _sums_of(call, self.of(model, call.kind))
        keys = self._names(model, call.kind)
        for key in keys:
            kept = self._kept(key)
            for name, amount in sums.items():
                kept[name] = kept.get(name, 0.0) + amount
        pairs = [each for pair in sums.items() for each in pair]
        args = (HALVE_AT, TTL_S, TTL_PER_CALL_S, *pairs)
        return Call(_LEARN, keys, args, otherwise=None)

    def of(self, model: str, kind: CallKind = ANY, *, whole: bool = False) -> CallStatistics:
        """Return the figures of a kind of calls, at most 10 s old.

        Without `whole`, a new template alone causes no round trip.  Its sums are those of this
        process until the wider sums are read again.  While Redis is away all are older, or the
        defaults.
        """
        keys = self._names(model, kind)
        needed = keys if whole else keys[:2]
        now = self.clock()
        if any(now - self._read_at.get(key, -math.inf) >= READ_EVERY_S for key in needed):
            self._read(keys, now)
        return statistics_of(*(self._sums.get(key, {}) for key in keys))

    def _names(self, model: str, kind: CallKind) -> tuple[str, str, str]:
        """Return the keys of the three kinds, the widest first."""
        return (
            self._keys.model(model),
            self._keys.model(model, "calls", kind.operation),
            self._keys.model(model, "calls", kind.operation, kind.template),
        )

    def _read(self, keys: tuple[str, str, str], now: float) -> None:
        def stored(client: redis.Redis) -> list[Any]:
            pipe = client.pipeline(transaction=False)
            for key in keys:
                pipe.hgetall(key)
            return pipe.execute(raise_on_error=False)

        try:
            found = self._store.call(stored)
        except (StoreUnavailable, RecordUnreadable):
            return
        for key, record in zip(keys, found, strict=True):
            sums = readable("the statistics of a model", [record] if record else [], _decoded)
            kept = self._kept(key)
            kept.clear()
            kept.update(sums[0] if sums else {})
            self._read_at[key] = now

    def _kept(self, key: str) -> dict[str, float]:
        """Return the sums of a key; those that were not used for long are dropped."""
        kept = self._sums.setdefault(key, {})
        self._sums.move_to_end(key)
        if len(self._sums) > KEPT:
            oldest, _ = self._sums.popitem(last=False)
            self._read_at.pop(oldest, None)
        return kept


def _sums_of(call: AnsweredCall, known: CallStatistics) -> dict[str, float]:
    """Return the amounts that one answer adds to the sums of its kinds.

    A count far from a line that is well known may be a mistake, so only a part of it counts.
    """
    usage, latency_s = call.answer.usage, call.answer.latency_s
    estimated, tokens = max(1.0, call.estimated), float(max(1, usage.prompt_tokens or 0))
    tokens = min(tokens, 4 * estimated + 4096)  # no text has more tokens than bytes
    if known.calls >= KNOWN_WELL:
        expected = known.prompt.tokens(estimated)
        tokens = min(max(tokens, expected / 4), 4 * expected + 200)
    answer = float(min(usage.completion_tokens or 0, 2 * call.max_tokens))
    share = answer / call.max_tokens
    sums = {
        "calls": 1.0,
        "prompts": 1.0,
        "inverse": 1 / estimated,
        "estimates": estimated,
        "tokens": tokens,
        "ratios": tokens / estimated,
        "squares": tokens**2 / estimated,
        "answers": answer,
        "share": share,
        "share2": share**2,
        "seconds": latency_s,
        "seconds2": latency_s**2,
        "priced": call.priced,
        "billed": call.priced
        if usage.money is None
        else min(usage.money, MOST_MARKUP * call.priced),
    }
    if call.has_form:
        sums |= {"repairs": 1.0} if call.is_repair else {"formed": 1.0}
    if call.slot_s is not None:
        sums |= {"paced": 1.0, "slot_s": call.slot_s}
    return sums


def _decoded(stored: Mapping[bytes, bytes]) -> dict[str, float]:
    """Return sums from Redis.  Raises ValueError for damaged ones."""
    sums = {name.decode(): float(amount) for name, amount in stored.items()}
    needed = ["calls", *(LINE_SUMS if sums.get("prompts") else ())]
    wrong = [name for name, amount in sums.items() if not 0 <= amount < math.inf]
    wrong += [name for name in needed if not sums.get(name)]
    if not wrong and sums.get("prompts"):
        least = sums["prompts"] ** 2 / sums["inverse"]  # by the inequality of Cauchy and Schwarz
        wrong += ["estimates"] if sums["estimates"] < least * (1 - 1e-6) else []
    if wrong:
        raise ValueError(f"these sums are damaged: {', '.join(wrong)}")
    return sums
