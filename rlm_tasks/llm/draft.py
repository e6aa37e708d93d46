"""A call before its model and endpoint are chosen, and the order of models to try.

`operations` makes drafts from items; `gate` turns one into a `Question` to a model.  Complexity
sets the tier of a call, and pressure lowers it.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace

import msgspec
from pydantic import BaseModel

from resilience.degradation import Degradation, Strategy
from rlm_tasks.llm.wire.answers import Question, estimated_prompt, estimated_tokens
from rlm_tasks.settings.llm import TIERS, LlmSettings, Tier

TIERS_OF_COMPLEXITY: dict[str, Tier] = {
    "simple": "small",
    "linear": "small",
    "medium": "medium",
    "": "medium",
}
"""The tier of a job whose request names none; any other complexity has the large tier."""

ESTIMATE_MARGIN = 1.3
"""A prompt may have up to this many times its estimated tokens."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Draft:
    """Messages (role and content each), and the length, tier and form of the answer."""

    messages: tuple[Message, ...]
    max_tokens: int
    tier: Tier
    temperature: float | None = None
    form: type[BaseModel] | None = None  # the answer must be JSON for this model
    samples: int = 1  # answers to this prompt, each by a call of its own
    sample: int = 0  # number of this call's answer among them
    fails_filtered: bool = False  # a text that a filter cut is a failure
    is_repair: bool = False  # it sends an answer of the wrong form back

    @property
    def estimated(self) -> int:
        """The estimated tokens of the prompt, without corrections from earlier calls."""
        schema = 0 if self.form is None else _size_of_schema(self.form)
        return estimated_prompt(self.messages) + schema

    def question(self, model: str) -> Question:
        """Return the question to a model."""
        schema = self.form.model_json_schema() if self.form is not None else None
        return Question(
            model=model,
            messages=self.messages,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            schema=schema,
        )

    def repaired(self, text: str, why: str) -> Draft:
        """Return a draft that sends an answer of the wrong form back, to be repaired."""
        request = f"That is not of the form asked for: {why}\nAnswer again, with the JSON alone."
        more = {"role": "assistant", "content": text}, {"role": "user", "content": request}
        return replace(self, messages=(*self.messages, *more), is_repair=True)


@functools.lru_cache(maxsize=256)
def _size_of_schema(form: type[BaseModel]) -> int:
    return estimated_tokens(msgspec.json.encode(form.model_json_schema()).decode())


def digest(question: Question) -> str:
    """Return a hash of model, messages and parameters, which is the same for identical calls."""
    return hashlib.blake2b(msgspec.json.encode(question), digest_size=20).hexdigest()


def tier_for(requested: Tier | None, complexity: str) -> Tier:
    """Return the tier that a request names, or the tier of its complexity."""
    return requested or TIERS_OF_COMPLEXITY.get(complexity, "large")


def models_for(
    tier: Tier,
    settings: LlmSettings,
    degradation: Degradation,
    *,
    prompt: float = 0,
    answer: int = 0,
) -> list[str]:
    """Return the models to try, in order.

    High pressure lowers the tier by one, critical pressure to the smallest.  The nearest tiers
    follow, the smaller one first, for the case that no endpoint of the first is healthy.  Models
    that cannot take the tokens of `prompt` and `answer` are left out, except the requested one.
    """
    requested = TIERS.index(tier)
    fitting = [
        at
        for at, each in enumerate(TIERS)
        if at == requested or _fits(prompt, answer, settings, settings.of_tier(each))
    ]
    if (at := degradation.size(requested)) not in fitting:
        at = requested
        degradation.shaped.discard(Strategy.SMALLER_MODEL)
    nearest = sorted(fitting, key=lambda each: (abs(each - at), each))
    return list(dict.fromkeys(settings.of_tier(TIERS[each]) for each in nearest))


def _fits(prompt: float, answer: int, settings: LlmSettings, model: str) -> bool:
    limits, tokens = settings.model(model), ESTIMATE_MARGIN * prompt + answer
    return answer <= limits.max_output_tokens and tokens <= min(
        limits.context_tokens, limits.tokens or settings.tokens
    )
