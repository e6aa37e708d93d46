"""Settings of the ledger, of nodes, of metrics and of traces."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field


class LedgerSettings(BaseModel, frozen=True, extra="forbid"):
    """How fast a lost worker or message is noticed."""

    lease_s: float = Field(
        30.0, gt=0, description="A running node is lost when nobody beats for this long."
    )
    sweep_s: float = Field(5.0, gt=0, description="How often each worker looks for overdue nodes.")
    grace_s: float | None = Field(
        None,
        gt=0,
        description="A queued node's message is looked for after this long; empty: as long as `sweep_s`.",
    )
    stop_grace_s: float = Field(
        2.0, gt=0, description="Running nodes of an ended job are fenced after this."
    )
    death_limit: int = Field(
        3, ge=1, description="An item that was in flight at this many deaths is quarantined."
    )

    @property
    def grace(self) -> float:
        """Seconds a message may take before somebody looks for it."""
        return self.sweep_s if self.grace_s is None else self.grace_s


class NodeSettings(BaseModel, frozen=True, extra="forbid"):
    """How a node works through its range."""

    target_ms: float = Field(
        1000.0, gt=0, description="A node hands over the rest of its range after this."
    )
    slice_ms: float = Field(
        50.0, gt=0, description="A node may cut after each slice of about this long."
    )
    pulse_ms: float = Field(
        250.0, gt=0, description="A running node tells and asks the ledger about this often."
    )
    item_limit_s: float = Field(
        0.0,
        ge=0,
        description="No item may run longer, whatever was learned; 0: as `adaptive_timeouts` says. Also `WORKFLOW_ACTIVITY_TIMEOUT_MINUTES`.",
    )
    timeout_multipliers: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Operations whose items may take longer, or less long, than their complexity says: JSON, name -> factor.",
    )
    adaptive_timeouts: bool = Field(
        True,
        description="Stop an item that runs longer than its complexity and its operation's p99 allow, 3 h at most. Also `ENABLE_ADAPTIVE_TIMEOUTS`.",
    )


class MetricsSettings(BaseModel, frozen=True, extra="forbid"):
    """Where a worker answers for itself; its port is an option of ``celery worker``, for each has
    its own.
    """

    address: str = Field(
        "127.0.0.1",
        description="Address of a worker's `--metrics-port`; `0.0.0.0`: every interface, where only `RLM_API_KEY` asks who it is.",
    )


class TracingSettings(BaseModel, frozen=True, extra="forbid"):
    """Which jobs become traces; where those go is said by OpenTelemetry's own variables."""

    enabled: bool = Field(
        False,
        description="Workers tell of jobs and nodes in OpenTelemetry spans (docs/tracing.md); needs the extra `otel`.",
    )
    sample_rate: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of jobs that are traced; one that is submitted under a trace follows that.",
    )
