"""Settings of the ledger, of nodes, of metrics and of traces, as sections of `model.Settings`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field


class LedgerSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How fast a lost worker or message is noticed."""

    lease_s: float = Field(
        default=30.0,
        gt=0,
        le=86_400,
        description="A running node counts as lost if its lease was not renewed for this long.",
    )
    sweep_s: float = Field(
        default=5.0, gt=0, description="Interval at which each worker searches for overdue nodes."
    )
    grace_s: float | None = Field(
        default=None,
        gt=0,
        description="Time after which the message of a queued node counts as late and may be sent "
        "again; empty: as long as `sweep_s`.",
    )
    stop_grace_s: float = Field(
        default=2.0,
        gt=0,
        description="Time after which running nodes of an ended job are fenced: the ledger "
        "refuses their results. Nodes of a job whose budget is spent may finish.",
    )
    death_limit: int = Field(
        default=3,
        ge=1,
        description="An item is quarantined after this number of processes died while it was in "
        "flight.",
    )
    node_records: int = Field(
        default=10_000,
        ge=10,
        description="Records of ended nodes that a job keeps; older ones are only counted.",
    )

    @property
    def grace(self) -> float:
        """Seconds that a message may be on its way before the sweep may send it again."""
        return self.sweep_s if self.grace_s is None else self.grace_s


class NodeSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The pace of a node, and the time limits of its items."""

    target_ms: float = Field(
        default=1000.0,
        gt=0,
        description="A node hands over the rest of its range after this running time.",
    )
    slice_ms: float = Field(
        default=50.0, gt=0, description="A node may cut after each slice of about this long."
    )
    pulse_ms: float = Field(
        default=250.0,
        gt=0,
        description="Interval at which a running node reports to the ledger and reads from it.",
    )
    output_mb: float = Field(
        default=8.0,
        gt=0,
        description="A node reports its outputs, and hands over the rest of its range, when they "
        "hold about this much memory.",
    )
    item_limit_s: float = Field(
        default=0.0,
        ge=0,
        description="Time limit of every item, in place of a learned one; 0: "
        "`adaptive_timeouts` decides. Also `WORKFLOW_ACTIVITY_TIMEOUT_MINUTES`.",
    )
    step_limit_s: float = Field(
        default=0.0,
        ge=0,
        description="Time limit of a merge, of `finalize`, of `then`, and of reading items; "
        "0: the base limit for the complexity of the job (docs/resilience.md, Time limits).",
    )
    timeout_multipliers: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Factors on the time limit that follows from an item's complexity, for single "
        "operations: JSON, name -> factor.",
    )
    adaptive_timeouts: bool = Field(
        default=True,
        description="Stop an item that runs longer than its complexity and its operation's p99 "
        "allow, 3 h at most. Also `ENABLE_ADAPTIVE_TIMEOUTS`.",
    )


class MetricsSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The address of a worker's metrics port.

    The port itself is an option of ``celery worker``, because each worker needs its own.
    """

    address: str = Field(
        default="127.0.0.1",
        description="Address of a worker's `--metrics-port`; `0.0.0.0`: every interface, "
        "protected by `RLM_API_KEY` alone.",
    )


class TracingSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The jobs that are traced; OpenTelemetry's own variables say where the traces go."""

    enabled: bool = Field(
        default=False,
        description="Workers record jobs and nodes as OpenTelemetry spans (docs/tracing.md); "
        "needs the extra `otel`.",
    )
    sample_rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of jobs that are traced; a job that is submitted within a trace "
        "is traced if that trace is.",
    )
