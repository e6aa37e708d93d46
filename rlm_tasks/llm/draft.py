"""What a call asks, before it is known of which model and where.

Decides which tier a call is worth, and by how much pressure lowers that; refuses to know providers
and their limits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
from pydantic import BaseModel

from resilience.degradation import Degradation, Strategy
from rlm_tasks.llm.endpoint import Question, estimated_prompt, estimated_tokens
from rlm_tasks.settings.llm import TIERS, LlmSettings, Tier

WORTH: dict[str, Tier] = {"simple": "small", "linear": "small", "medium": "medium", "": "medium"}
"""The tier of a job's complexity, where the request names none; whatever is not here is worth the
large one.
"""

ROOM = 1.3
"""A prompt may have so many times the tokens that it is estimated to have."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Draft:
    """Messages (role and content each) and what the answer may be: so long, of so high a tier, of
    this form.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    tier: Tier
    temperature: float | None = None
    form: type[BaseModel] | None = None  # the answer is JSON of this model

    @property
    def estimated(self) -> int:
        """About how many tokens a provider counts of it, before what is known of such prompts."""
        schema = (
            0
            if self.form is None
            else estimated_tokens(msgspec.json.encode(self.form.model_json_schema()).decode())
        )
        return estimated_prompt(self.messages) + schema

    def question(self, model: str) -> Question:
        """Return it as it is asked of a model."""
        schema = self.form.model_json_schema() if self.form is not None else None
        return Question(
            model=model,
            messages=self.messages,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            schema=schema,
        )

    def repaired(self, text: str, why: str) -> Draft:
        """Return it with an answer of the wrong form, and the request to put that right."""
        asked: tuple[Message, ...] = (
            {"role": "assistant", "content": text},
            {
                "role": "user",
                "content": f"That is not of the form asked for: {why}\nAnswer again, with the JSON alone.",
            },
        )
        return Draft(
            messages=(*self.messages, *asked),
            max_tokens=self.max_tokens,
            tier=self.tier,
            temperature=self.temperature,
            form=self.form,
        )


def digest(question: Question) -> str:
    """Return by which name identical calls know each other: model, messages and parameters, and
    nothing to read them from.
    """
    return hashlib.blake2b(msgspec.json.encode(question), digest_size=20).hexdigest()


def tier_for(asked: Tier | None, complexity: str) -> Tier:
    """Return the tier a request names, or that of its complexity."""
    return asked or WORTH.get(complexity, "large")


def models_for(
    tier: Tier,
    settings: LlmSettings,
    degradation: Degradation,
    *,
    prompt: float = 0,
    answer: int = 0,
) -> list[str]:
    """Return the models to try, the one to try first first.

    High pressure asks for one tier less, critical pressure for the smallest.  Behind it come the
    nearest tiers, the smaller one first: for when no endpoint of it is well.  Models that cannot
    take so many tokens are left out, but for the one that is asked for."""
    asked = TIERS.index(tier)
    fitting = [
        at
        for at, each in enumerate(TIERS)
        if at == asked or _takes(prompt, answer, settings, settings.of_tier(each))
    ]
    if (at := degradation.size(asked)) not in fitting:
        at = asked
        degradation.shaped.discard(Strategy.SMALLER_MODEL)
    nearest = sorted(fitting, key=lambda each: (abs(each - at), each))
    return list(dict.fromkeys(settings.of_tier(TIERS[each]) for each in nearest))


def _takes(prompt: float, answer: int, settings: LlmSettings, model: str) -> bool:
    its, needs = settings.model(model), ROOM * prompt + answer
    return answer <= its.max_output_tokens and needs <= min(
        its.context_tokens, its.tokens or settings.tokens
    )
