"""What a request of each operation may say in its `params`, checked before anything is enqueued.

Decides defaults and what a prompt does with an item; refuses to know how it is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, Field, field_validator

from resilience.validation import Checked
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.llm.structured_output import form_of, path_of
from rlm_tasks.settings.llm import LlmSettings, Tier

P = TypeVar("P", bound="Params")
ITEM = "{item}"


class Params(Checked):
    """What all operations that call models take."""

    invalid = InvalidRequest

    system: str = Field(
        "", description="What the model is told before each prompt: what all items share."
    )
    tier: Tier | None = Field(
        None, description="small, medium or large; empty: as the request's complexity says."
    )
    max_tokens: int = Field(1024, ge=1, description="Of one answer.")
    temperature: float | None = Field(None, ge=0, le=2, description="Empty: the provider's own.")

    def fits(self, settings: LlmSettings, tier: Tier) -> None:
        """Raise InvalidRequest when no answer can be as long as asked for."""
        name = settings.of_tier(self.tier or tier)
        its = settings.model(name)
        most = min(its.max_output_tokens, int((its.tokens or settings.tokens) * 0.9))
        if not any(
            not each.models or name in each.models for each in settings.endpoints_or_default
        ):
            raise InvalidRequest(
                "tier", self.tier or tier, f"no endpoint of RLM_LLM__ENDPOINTS has its model {name}"
            )
        if self.max_tokens > most:
            raise InvalidRequest(
                "max_tokens",
                self.max_tokens,
                f"model {name} answers with {most} at most; ask for less",
            )

    def pays(self, budget: Mapping[str, float], model: str, settings: LlmSettings) -> None:
        """Raise InvalidRequest when a budget pays no call, or cannot be counted."""
        if budget.get("tokens", self.max_tokens) < self.max_tokens:
            why = f"an answer alone may take {self.max_tokens} tokens; give more, or ask for a smaller max_tokens"
            raise InvalidRequest("budget", {"tokens": budget["tokens"]}, why)
        if "money" in budget and not settings.is_priced(model):
            why = (
                f"model {model} has no price; give it one in RLM_LLM__MODELS, 0 if it costs nothing"
            )
            raise InvalidRequest("budget", {"money": budget["money"]}, why)


class Map(Params):
    """``llm.map``: a prompt for each item."""

    prompt: str = Field(
        min_length=1,
        description="`{item}` stands for the item, `{name}` for a field of an item that has it.",
    )
    output: str = Field(
        "", description="A pydantic model, or its `module:Name`, that answers have to fit."
    )

    @field_validator("output", mode="before")
    @classmethod
    def _is_a_model(cls, value: Any) -> Any:
        path = path_of(value) if isinstance(value, type) else value
        if path and isinstance(path, str):
            form_of(path)
        return path

    @property
    def form(self) -> type[BaseModel] | None:
        """The model that answers have to fit."""
        return form_of(self.output) if self.output else None

    def filled(self, item: Any) -> str:
        """Return the prompt for an item."""
        text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
        fields = (
            {f"{{{name}}}": str(value) for name, value in item.items()}
            if isinstance(item, Mapping)
            else {}
        )
        if not any(name in self.prompt for name in (ITEM, *fields)):
            return f"{self.prompt}\n\n{text}"
        return _replaced(self.prompt, {ITEM: text, **fields})


class MapReduce(Map):
    """``llm.map_reduce``: a prompt for each item, then merges by the model, until one answer is
    left.
    """

    merge_prompt: str = Field(
        "Merge these into one text of the same kind. Keep what matters, say nothing twice, add nothing.",
        min_length=1,
        description="What the model is asked of the answers that it merges.",
    )
    fan_in: int = Field(8, ge=2, le=100, description="Answers of one merge, if so many fit.")
    group_tokens: int = Field(
        0, ge=0, description="Of the answers of one merge; 0: as many as fit."
    )


class Ask(Params):
    """``llm.ask``: a question about items that do not fit into a context together."""

    question: str = Field(min_length=1, description="In plain words.")
    group_tokens: int = Field(8000, ge=100, description="Of the items that a model reads at once.")
    max_rounds: int = Field(
        4, ge=1, le=20, description="How often what was found is narrowed before it must do."
    )


def parsed(model: type[P], params: Mapping[str, Any] | BaseModel) -> P:
    """Return checked params.  Raises InvalidRequest naming the field."""
    return params if isinstance(params, model) else model(**dict(params))


def _replaced(text: str, values: Mapping[str, str]) -> str:
    """Replace names all at once: what an item says is never taken for a name."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], text)
