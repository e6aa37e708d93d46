"""Settings of calls to language models: endpoints, models, their limits and prices.

`llm` and plans read them.  Keys are not here: an endpoint names the variable that holds its key,
and `settings.environment` reads that variable.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from scheduler.routing import RoutingAlgorithm

Tier = Literal["small", "medium", "large"]
TIERS: tuple[Tier, ...] = ("small", "medium", "large")


class ModelSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One model: the size of its context and answers, its prices, the limits of its provider."""

    context_tokens: int = Field(default=128_000, gt=0)
    max_output_tokens: int = Field(default=16_384, gt=0)
    input_price: float = Field(default=0.0, ge=0)  # money for a million tokens of a prompt
    # money for a million tokens of a prompt that the provider had in its cache; None: input_price
    cached_price: float | None = Field(default=None, ge=0)
    output_price: float = Field(default=0.0, ge=0)  # money for a million tokens of an answer
    requests: float | None = Field(
        default=None, gt=0
    )  # in any window; None: `LlmSettings.requests`
    tokens: float | None = Field(default=None, gt=0)  # in any window; None: `LlmSettings.tokens`


class EndpointSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One address with the interface of OpenAI."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    base_url: str = ""  # such as https://HOST/v1; empty: the value of OPENAI_BASE_URL
    key_env: str = "OPENAI_API_KEY"  # the variable that holds its key
    weight: float = Field(default=1.0, gt=0)  # its share of the calls, where `routing` is weighted
    models: dict[
        str, str
    ] = {}  # our name of a model -> its name there; empty: all, as we name them
    max_tokens_as: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="Reasoning models know only `max_completion_tokens`."
    )
    health_path: str = Field(
        default="/models",
        description="Path below base_url that health checks ask for; empty: it is not checked.",
    )
    # most calls in flight over all workers; "auto": follows the time of calls; None: no limit
    in_flight: Literal["auto"] | Annotated[int, Field(gt=0, strict=True)] | None = "auto"
    stream: bool = False  # with streamed answers a time limit bounds each pause, not the whole call

    @field_validator("key_env")
    @classmethod
    def _is_a_variable(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "must be the name of a variable, in capitals; that variable holds the key itself"
            )
        return value

    @field_validator("health_path")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must start with /, or be empty to switch the check off")
        return value

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if "@" in value:
            raise ValueError(
                "must hold no user or password; set key_env to the variable that holds the key"
            )
        return value.rstrip("/")


PRICES = {
    "gpt-4.1-nano": ModelSettings(
        context_tokens=1_047_576,
        max_output_tokens=32_768,
        input_price=0.10,
        cached_price=0.025,
        output_price=0.40,
    ),
    "gpt-4.1-mini": ModelSettings(
        context_tokens=1_047_576,
        max_output_tokens=32_768,
        input_price=0.40,
        cached_price=0.10,
        output_price=1.60,
    ),
    "gpt-4.1": ModelSettings(
        context_tokens=1_047_576,
        max_output_tokens=32_768,
        input_price=2.00,
        cached_price=0.50,
        output_price=8.00,
    ),
}
"""Limits and prices of the models of the default tiers, in US dollars, from the provider's list of
2025.  `LlmSettings.models` comes first.
"""


class LlmSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Calls to language models."""

    endpoints: tuple[EndpointSettings, ...] = Field(
        default=(),
        description='Providers, as JSON: `[{"name": "main", "base_url": "https://HOST/v1", '
        '"key_env": "MAIN_KEY"}, ...]`; empty: one, from `OPENAI_BASE_URL` and '
        "`OPENAI_API_KEY` (docs/llm.md).",
    )
    small: str = Field(default="gpt-4.1-nano", min_length=1, description="Model of the small tier.")
    medium: str = Field(
        default="gpt-4.1-mini", min_length=1, description="Model of the medium tier."
    )
    large: str = Field(default="gpt-4.1", min_length=1, description="Model of the large tier.")
    models: dict[str, ModelSettings] = Field(
        default={},
        description='Limits and prices of models, as JSON: name -> `{"context_tokens": 128000, '
        '"max_output_tokens": 16384, "input_price": 0.4, "cached_price": 0.1, '
        '"output_price": 1.6, "requests": 3500, "tokens": 90000}`; '
        "prices are for a million tokens.",
    )
    requests: float = Field(
        default=3500.0, gt=0, description="Requests in any window, for each model and key."
    )
    tokens: float = Field(
        default=90_000.0, gt=0, description="Tokens in any window, for each model and key."
    )
    window_s: float = Field(
        default=60.0, gt=0, description="Length of the window that providers count by, in seconds."
    )
    bytes_per_s: float = Field(
        default=10e6,
        gt=0,
        description="Bytes a second to and from each endpoint, over all workers.",
    )
    routing: RoutingAlgorithm = Field(
        default="round_robin",
        description="How the endpoint of a call is selected among the healthy ones that have its "
        "model.",
    )
    pool: int = Field(default=50, gt=0, description="Most calls in flight in one worker process.")
    per_host: int = Field(
        default=10,
        gt=0,
        description="Most calls in flight from one worker process to one endpoint.",
    )
    timeout_s: float = Field(default=60.0, gt=0, description="Time limit of one call.")
    hold_most_s: float = Field(
        default=600.0,
        gt=0,
        description="Longest pause after a 429, whatever the provider asks for; then it is asked "
        "again. `rlm limits release` ends a pause at once.",
    )
    idle_s: float = Field(
        default=300.0, gt=0, description="A connection without calls is kept open for this long."
    )
    health_every_s: float = Field(
        default=30.0, gt=0, description="Interval between two health checks of an endpoint."
    )
    health_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="A health check fails if the endpoint does not answer within this time.",
    )
    health_strikes: int = Field(
        default=3,
        ge=1,
        description="An endpoint gets no calls after this number of failed checks in a row, until "
        "a check succeeds.",
    )
    memory_warn_mb: float = Field(
        default=120.0,
        gt=0,
        description="A process clears its caches when it has grown by this since its first call "
        "to a model.",
    )
    memory_critical_mb: float = Field(
        default=140.0,
        gt=0,
        description="A process that has still grown by this after that is replaced at the end of "
        "its node. Memory from before the first call does not count: Celery and the "
        "client of models alone may hold more than that.",
    )
    attempts: int = Field(
        default=4,
        ge=1,
        description="Attempts at a call that fails; 429 and an open breaker cost none.",
    )
    repairs: int = Field(
        default=2,
        ge=0,
        description="How often an answer that does not fit its schema is sent back to be repaired.",
    )
    merge_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of a budget that is kept for the rounds that merge.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> LlmSettings:
        names = [each.name for each in self.endpoints]
        if len(set(names)) < len(names):
            raise ValueError(f"endpoints must have different names, not {', '.join(names)}")
        return self

    @property
    def endpoints_or_default(self) -> tuple[EndpointSettings, ...]:
        """The endpoints, or else the one of OPENAI_BASE_URL and OPENAI_API_KEY."""
        return self.endpoints or (EndpointSettings(name="default"),)

    def model(self, name: str) -> ModelSettings:
        """Return the settings of a model, or the defaults for an unknown one."""
        return self.models.get(name) or PRICES.get(name) or ModelSettings()

    def is_priced(self, name: str) -> bool:
        """Return whether the price of a model is known."""
        return bool({"input_price", "output_price"} & self.model(name).model_fields_set)

    def of_tier(self, tier: Tier) -> str:
        """Return the name of a tier's model."""
        return str(getattr(self, tier))
