"""The settings of Redis and of guards: all that a web service needs to share the workers' guards.

Stores and breakers read them, and `rlm_tasks.settings.Settings` extends them.  Begin with
`StoreSettings`.  These two classes alone read the environment: the variables ``RLM_<FIELD>`` and
``RLM_<SECTION>__<FIELD>``, and names of other orchestrators (ALIASES).
"""

from __future__ import annotations

import functools
import os
from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from resilience.address import SENTINEL, URLS, Address, check

ALIASES: dict[str, tuple[tuple[str, ...], float]] = {
    "CIRCUIT_BREAKER_ENABLED": (("breakers", "enabled"), 1),
    "CIRCUIT_BREAKER_FAILURE_THRESHOLD": (("breakers", "failure_threshold"), 1),
    "ENABLE_ADAPTIVE_TIMEOUTS": (("node", "adaptive_timeouts"), 1),
    "ENABLE_DYNAMIC_SCALING": (("autoscale", "enabled"), 1),
    "WORKFLOW_ACTIVITY_TIMEOUT_MINUTES": (("node", "item_limit_s"), 60),
    "WORKFLOW_MAX_CONCURRENT_ACTIVITIES": (("slots",), 1),
    "WORKFLOW_MAX_BATCH_SIZE": (("batch", "max_size"), 1),
    "WORKFLOW_MAX_CONCURRENT_WORKFLOWS": (("admission", "max_jobs"), 1),
}
"""Variable of another orchestrator -> path of its field, and the factor from its unit to ours."""


class BreakerSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of all breakers."""

    enabled: bool = Field(
        default=True,
        description="Off: breakers let every call pass. Also `CIRCUIT_BREAKER_ENABLED`.",
    )
    failure_threshold: int | None = Field(
        default=None,
        ge=1,
        description="Failures in a row that open a breaker, if no preset or configuration is "
        "given. Also `CIRCUIT_BREAKER_FAILURE_THRESHOLD`.",
    )
    recovery_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Time until an open breaker lets probes pass, if no preset or configuration "
        "is given; empty: 60 s.",
    )


class StoreSettings(BaseSettings):
    """The Redis to use, the prefix of its keys, and the time that guards wait for it."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix="RLM_",
        env_nested_delimiter="__",
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,  # a URL may contain a password
        allow_inf_nan=False,
    )

    redis_url: str = Field(
        default="redis://localhost:6379/0",
        description="Redis of the ledger and of the state that all workers share. `rediss://` "
        "uses TLS, `sentinel://` asks sentinels for the primary (docs/transports.md).",
    )
    sentinel_master: str = Field(
        default="",
        validate_default=True,
        description="Name of the primary that the sentinels of a `sentinel://` URL watch.",
    )
    sentinel_password: str = Field(
        default="",
        repr=False,
        description="Password of the sentinels; the password of Redis is in the URL.",
    )
    namespace: str = Field(
        default="rlm",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Prefix of every key and queue; platforms with different prefixes share "
        "nothing.",
    )

    @field_validator("redis_url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        if not value.startswith(URLS):
            raise ValueError(f"must start with {', '.join(URLS)}")
        check(value)
        return value

    @field_validator("sentinel_master")
    @classmethod
    def _is_named(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.data.get("redis_url", "").startswith(SENTINEL):
            raise ValueError(
                "give the name that the sentinels watch the primary by, "
                "as in `sentinel monitor NAME ...`"
            )
        return value

    @property
    def address(self) -> Address:
        """The address of Redis."""
        return Address(self.redis_url, self.sentinel_master, self.sentinel_password)

    guard_timeout_s: float = Field(
        default=0.1,
        gt=0,
        description="A call of a breaker waits this long for Redis. A breaker without an answer "
        "goes on with the state that it knows, for `RLM_LIMIT_TIMEOUT_S`.",
    )
    limit_timeout_s: float = Field(
        default=2.0,
        gt=0,
        description="A bucket, budget, bulkhead or probe waits this long for Redis, then decides "
        "without it. A lost connection is no wait.",
    )
    breakers: BreakerSettings = BreakerSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, ALIASES last: an ``RLM_`` variable beside an alias counts."""
        return init_settings, env_settings, _Aliases(settings_cls)


class _Aliases(PydanticBaseSettingsSource):
    """The variables of ALIASES, as a source of settings."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Never called: `__call__` reads all variables at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Return the values of the variables that are set, nested by section."""
        values: dict[str, Any] = {}
        for variable, ((*sections, field), factor) in ALIASES.items():
            text = os.environ.get(variable, "")
            if text and [*sections, field][0] in self.settings_cls.model_fields:
                is_number = factor != 1 and text.replace(".", "", 1).isdigit()
                section = functools.reduce(
                    lambda inner, name: inner.setdefault(name, {}), sections, values
                )
                section[field] = float(text) * factor if is_number else text
        return values


@functools.cache
def store_settings() -> StoreSettings:
    """Return the settings of this process, read from the environment once."""
    return StoreSettings()
