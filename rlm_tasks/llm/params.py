"""The `params` of the operations that call models, checked before anything is enqueued.

`operations` reads them for each item and merge; a mistake raises InvalidRequest at submit.  Begin
with `Params` and `Map`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, field_validator

from resilience.validation import Checked
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.llm.structured_output import form_of, path_of
from rlm_tasks.settings.llm import LlmSettings, Tier

P = TypeVar("P", bound="Params")
ITEM = "{item}"


class Params(Checked):
    """The parameters of all operations that call models."""

    invalid = InvalidRequest

    system: str = Field(
        default="", description="The system message before each prompt: text that all items share."
    )
    tier: Tier | None = Field(
        default=None,
        description="small, medium or large; empty: the tier of the request's complexity.",
    )
    max_tokens: int = Field(default=1024, ge=1, description="Most tokens of one answer.")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Temperature of the model; empty: the provider's default.",
    )

    filtered_answers: Literal["keep", "fail"] = Field(
        default="keep",
        description="A text that a filter of the provider cut: `keep` uses it, and the receipt "
        "counts it; `fail` fails the item.",
    )

    def fits(self, settings: LlmSettings, tier: Tier) -> None:
        """Raise InvalidRequest when no answer can have max_tokens, or no endpoint has the model."""
        name = settings.of_tier(self.tier or tier)
        model = settings.model(name)
        most = min(model.max_output_tokens, int((model.tokens or settings.tokens) * 0.9))
        if not any(
            not each.models or name in each.models for each in settings.endpoints_or_default
        ):
            raise InvalidRequest(
                "tier",
                self.tier or tier,
                f"no endpoint of RLM_LLM__ENDPOINTS has its model {name}; take another tier",
            )
        if self.max_tokens > most:
            raise InvalidRequest(
                "max_tokens",
                self.max_tokens,
                f"model {name} answers with {most} tokens at most; set a smaller value",
            )

    def pays(self, budget: Mapping[str, float], model: str, settings: LlmSettings) -> None:
        """Raise InvalidRequest when a budget pays for no call, or the model has no price."""
        if budget.get("tokens", self.max_tokens) < self.max_tokens:
            why = (
                f"one answer may take {self.max_tokens} tokens; set a larger budget or a smaller "
                "max_tokens"
            )
            raise InvalidRequest("budget", {"tokens": budget["tokens"]}, why)
        if "money" in budget and not settings.is_priced(model):
            why = f"model {model} has no price; set it in RLM_LLM__MODELS, to 0 if it costs nothing"
            raise InvalidRequest("budget", {"money": budget["money"]}, why)


class Prompted(Params):
    """A prompt for each item."""

    prompt: str = Field(
        min_length=1,
        description="The prompt; `{item}` is replaced by the item, `{name}` by that field of it.",
    )
    output: str = Field(
        default="", description="A pydantic model, or its `module:Name`; each answer must fit it."
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
        """The pydantic model of the answers, or None."""
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


class Map(Prompted):
    """``llm.map``: a prompt for each item."""

    samples: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Answers to each prompt. Above 1 the output of an item is a list of answers, "
        "each from a call of its own.",
    )


class MapReduce(Prompted):
    """``llm.map_reduce``: a prompt for each item, then merges until one answer is left."""

    merge_prompt: str = Field(
        default="Merge these into one text of the same kind. Keep what matters, say nothing twice, "
        "add nothing.",
        min_length=1,
        description="The prompt of a merge; the answers to merge follow it.",
    )
    fan_in: int = Field(default=8, ge=2, le=100, description="Most answers of one merge.")
    group_tokens: int = Field(
        default=0, ge=0, description="Most tokens of the answers of one merge; 0: as many as fit."
    )


class Ask(Params):
    """``llm.ask``: a question about items that do not fit into a context together."""

    question: str = Field(min_length=1, description="The question, in plain words.")
    group_tokens: int = Field(
        default=8000, ge=100, description="Most tokens of the items that a model reads in one call."
    )
    max_rounds: int = Field(
        default=4, ge=1, le=20, description="Most rounds of reading before the final answer."
    )


def parsed(model: type[P], params: Mapping[str, Any] | BaseModel) -> P:
    """Return checked params.  Raises InvalidRequest with the field."""
    return params if isinstance(params, model) else model(**dict(params))


def _replaced(text: str, values: Mapping[str, str]) -> str:
    """Return the text with all names replaced in one pass.

    So a name inside an item is not replaced.
    """
    return re.sub("|".join(map(re.escape, values)), lambda name: values[name[0]], text)
