"""Where the shared state lives: the settings that a web service needs, too, when it uses the guards alone.

`rlm_tasks.settings.Settings` extends them; together they are the only place that reads the environment.
"""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class StoreSettings(BaseSettings):
    """Which Redis, and which names in it."""

    model_config = SettingsConfigDict(
        frozen=True, env_prefix="RLM_", env_nested_delimiter="__", extra="ignore", populate_by_name=True
    )

    redis_url: str = Field("redis://localhost:6379/0", description="Redis of the ledger and of what all workers share.")
    namespace: str = Field(
        "rlm", pattern=r"^[A-Za-z0-9_-]+$", description="Starts every key and queue; platforms with different ones do not meet."
    )
    guard_timeout_s: float = Field(
        0.1,
        gt=0,
        description="A breaker, bucket, bulkhead or retry budget takes Redis for away after this, and answers by itself.",
    )
