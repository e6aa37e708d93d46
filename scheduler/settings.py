"""What can be tuned of the machine's rules, with defaults and units: ``RLM_<SECTION>__<FIELD>``.

A record, no decisions.  Numbers are those of the source documents where they give one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator


class PressureSettings(BaseModel, frozen=True, extra="forbid"):
    """How pressure is measured, and when a level changes."""

    cpu: Literal["waiting", "utilisation"] = Field(
        "waiting",
        description="CPU counts when work waits for it; `utilisation`: by how busy it is, as in the source document's table.",
    )
    thresholds: tuple[float, float, float, float] = Field(
        (65.0, 75.0, 85.0, 95.0),
        description="Percent at which elevated, high, critical and emergency begin.",
    )
    max_memory_mb: float = Field(
        0.0, ge=0, description="A host's memory is this, should its limit be larger; 0: its limit."
    )
    release_s: float = Field(
        20.0,
        gt=0,
        description="A level falls by one step after the load was below it for this long.",
    )
    release_pct: float = Field(
        5.0, ge=0, description="... and by so many percent below its threshold."
    )
    stale_s: float = Field(
        15.0, gt=0, description="A level that nobody has renewed for this long is not trusted."
    )
    monitor_s: float = Field(
        5.0, gt=0, description="How often beat has the cluster's level worked out."
    )
    history: int = Field(2000, ge=10, description="Records of the cluster's level that are kept.")
    enabled: bool = Field(
        True, description="Off: every level is normal, and nothing is ever left out."
    )

    @model_validator(mode="after")
    def _rising(self) -> PressureSettings:
        if (
            list(self.thresholds) != sorted(set(self.thresholds))
            or not self.thresholds[0] > 0
            or self.thresholds[3] > 100
        ):
            raise ValueError("thresholds must rise, between 0 and 100")
        if self.monitor_s >= self.stale_s:
            raise ValueError(
                f"monitor_s must be less than stale_s={self.stale_s:g}: a level would be forgotten before it is renewed"
            )
        return self


class AdmissionSettings(BaseModel, frozen=True, extra="forbid"):
    """What is taken in under load.  A bound of 0 does not bound."""

    max_jobs: int = Field(
        0,
        ge=0,
        description="At most so many jobs are at work at once, critical ones aside; the same in clients and workers. Also "
        "`WORKFLOW_MAX_CONCURRENT_WORKFLOWS`.",
    )
    queue_depth: int = Field(
        10_000,
        ge=0,
        description="A queue with so many messages, copies that recovery has sent included, takes no new job of its priority.",
    )
    wait_critical_s: float = Field(
        0.0,
        ge=0,
        description="... nor one whose oldest message waits longer than this, by priority.",
    )
    wait_high_s: float = Field(10.0, ge=0, description="... of high work.")
    wait_normal_s: float = Field(30.0, ge=0, description="... of normal work.")
    wait_low_s: float = Field(60.0, ge=0, description="... of low work.")
    overload: Literal["refuse", "delay"] = Field(
        "refuse",
        description="What becomes of a job that does not fit now: an error that says when to come back, or it waits.",
    )

    def wait_s(self, priority: str) -> float:
        """Return the longest wait of a priority's queue, in seconds; 0: none, as for the platform's
        own work.
        """
        return float(getattr(self, f"wait_{priority}_s", 0.0))


class AllocationSettings(BaseModel, frozen=True, extra="forbid"):
    """How many nodes may run at once."""

    max_workers: int = Field(
        32, ge=1, description="Nodes of one operation at once, without a policy of its own."
    )
    min_workers: int = Field(
        4,
        ge=1,
        description="... that are left to it under pressure; one to low work in an emergency.",
    )
    policies: str = Field(
        "",
        description="A JSON file of allocation policies, a list of objects as in docs/pressure.md; empty: none.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AllocationSettings:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers must be at most max_workers={self.max_workers}")
        return self


class BatchSettings(BaseModel, frozen=True, extra="forbid"):
    """How many requests `batch_submit` opens at a time."""

    max_size: int = Field(
        50, ge=1, description="Of a batch while load is moderate. Also `WORKFLOW_MAX_BATCH_SIZE`."
    )


class AutoscaleSettings(BaseModel, frozen=True, extra="forbid"):
    """When the cluster should have more workers, or fewer (source document 3)."""

    enabled: bool = Field(
        True,
        description="Off: batches are of `RLM_BATCH__MAX_SIZE` whatever the load, a pool of `--autoscale` is as large as it may "
        "be, no number of workers is advised. Also `ENABLE_DYNAMIC_SCALING`.",
    )
    cpu_pct: float = Field(75.0, gt=0, description="More workers when CPU is above this ...")
    memory_pct: float = Field(80.0, gt=0, description="... or memory above this ...")
    sustained_s: float = Field(300.0, gt=0, description="... for this long,")
    queue_depth: int = Field(1000, ge=1, description="or so many messages wait,")
    wait_s: float = Field(30.0, gt=0, description="or one waits longer than this.")
    min_workers: int = Field(2, ge=1, description="Fewest workers.")
    max_workers: int = Field(10, ge=1, description="Most workers.")
    increment: int = Field(1, ge=1, description="Workers more, or fewer, in one step.")
    cooldown_s: float = Field(600.0, ge=0, description="No second step within this.")
    webhook_url: str = Field(
        "", repr=False, description="Told of each change of the advice, as JSON; empty: nobody."
    )

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleSettings:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers must be at most max_workers={self.max_workers}")
        return self


class SnapshotSettings(BaseModel, frozen=True, extra="forbid"):
    """How operations are compared with their own past; the monitor does it, so beat must run."""

    enabled: bool = Field(
        True,
        description="Off: no snapshots are taken, and nobody is told that an operation became slower.",
    )
    every_s: float = Field(
        60.0, gt=0, description="A snapshot of each operation that ran is taken this often."
    )
    keep: int = Field(
        240,
        ge=20,
        description="Snapshots of an operation that are kept; its past is what they know.",
    )
    threshold: float = Field(
        0.2,
        gt=0,
        description="An operation whose items take so much longer than before is told as `performance.degraded`.",
    )


class AlertSettings(BaseModel, frozen=True, extra="forbid"):
    """Who is told what goes wrong."""

    channels: tuple[Literal["log", "webhook", "stdout"], ...] = Field(
        ("log",), description="JSON list of log, webhook, stdout."
    )
    webhook_url: str = Field(
        "", repr=False, description="Alerts are POSTed here as JSON, when `webhook` is a channel."
    )
    webhook_secret: str = Field(
        "",
        repr=False,
        description="Signs webhooks: HMAC-SHA256 of the time and the body, in X-RLM-Signature.",
    )
    slow_execution_ms: float = Field(
        30_000.0, gt=0, description="An item that takes longer is told as `execution.slow`."
    )
    memory_mb: float = Field(
        500.0, gt=0, description="A pool process above this is told as `memory.high`."
    )
    cpu_pct: float = Field(80.0, gt=0, description="A host above this is told as `cpu.high`.")
    history: int = Field(1000, ge=10, description="Alerts and events that are kept.")
