"""Settings of the scheduling rules, with defaults and units: ``RLM_<SECTION>__<FIELD>``.

`rlm_tasks.settings` reads them from the environment, and the modules of this package take them as
arguments.  Each class is one section.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator


class PressureSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How pressure is measured, and when a level changes."""

    cpu: Literal["waiting", "utilisation"] = Field(
        default="waiting",
        description="`waiting`: CPU counts only when work waits for it, and refuses no jobs; "
        "`utilisation`: CPU counts by its busy share, and refuses jobs as memory does.",
    )
    thresholds: tuple[float, float, float, float] = Field(
        default=(65.0, 75.0, 85.0, 95.0),
        description="Percentages at which elevated, high, critical and emergency begin.",
    )
    max_memory_mb: float = Field(
        default=0.0,
        ge=0,
        description="Memory limit of a host, if its own limit is larger; 0: its own limit.",
    )
    release_s: float = Field(
        default=20.0,
        gt=0,
        description="A level falls by one step after the load was below its threshold for this "
        "long.",
    )
    release_pct: float = Field(
        default=5.0,
        ge=0,
        description="Percentage points by which the load must stay below the threshold for that.",
    )
    stale_s: float = Field(
        default=15.0, gt=0, description="A level that was not renewed for this long is ignored."
    )
    monitor_s: float = Field(
        default=5.0, gt=0, description="Interval at which beat has the cluster's level measured."
    )
    history: int = Field(
        default=2000, ge=10, description="Number of records of the cluster's level that are kept."
    )
    enabled: bool = Field(
        default=True, description="Off: every level is normal, and nothing is left out."
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
                f"monitor_s must be less than stale_s={self.stale_s:g}: "
                "a level would expire before it is renewed"
            )
        return self


class AdmissionSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The bounds within which new jobs are accepted; 0 is no bound."""

    max_jobs: int = Field(
        default=0,
        ge=0,
        description="Most jobs at work at once, critical jobs not counted; 0: no bound. Use the "
        "same value in clients and workers. Also `WORKFLOW_MAX_CONCURRENT_WORKFLOWS`.",
    )
    queue_depth: int = Field(
        default=10_000,
        ge=0,
        description="A queue with this number of messages takes no new job of its priority. "
        "Copies that recovery has sent count, too; 0: no bound.",
    )
    wait_critical_s: float = Field(
        default=0.0,
        ge=0,
        description="A queue whose oldest message waits longer than this takes no new critical "
        "job; 0: no bound.",
    )
    wait_high_s: float = Field(default=10.0, ge=0, description="The same for high jobs.")
    wait_normal_s: float = Field(default=30.0, ge=0, description="The same for normal jobs.")
    wait_low_s: float = Field(default=60.0, ge=0, description="The same for low jobs.")
    overload: Literal["refuse", "delay"] = Field(
        default="refuse",
        description="`refuse`: a job that does not fit now raises an error with the time to come "
        "back; `delay`: it waits.",
    )

    def wait_s(self, priority: str) -> float:
        """Return the longest wait of a priority's queue, in seconds; 0: no bound, as for the
        platform's own work.
        """
        return float(getattr(self, f"wait_{priority}_s", 0.0))


class AllocationSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The number of nodes of an operation that may run at once."""

    max_workers: int = Field(
        default=32,
        ge=1,
        description="Most nodes of one operation at once, if the operation has no policy.",
    )
    min_workers: int = Field(
        default=4,
        ge=1,
        description="Nodes that such an operation keeps under pressure; low-priority work keeps "
        "one in an emergency.",
    )
    policies: str = Field(
        default="",
        description="JSON file with a list of allocation policies, as in docs/pressure.md; empty: "
        "none.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AllocationSettings:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers must be at most max_workers={self.max_workers}")
        return self


class BatchSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The number of requests that `batch_submit` opens at a time."""

    max_size: int = Field(
        default=50,
        ge=1,
        description="Requests that `batch_submit` opens at a time under moderate load; where "
        "workers live, at most that number of its jobs are open and unclaimed. Also "
        "`WORKFLOW_MAX_BATCH_SIZE`.",
    )
    wait_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Longest time in all that one `batch_submit` waits for workers to take in the "
        "jobs before; then it opens the rest. 0: it never waits.",
    )
    router: bool = Field(
        default=False,
        description="Jobs of all clients together are opened at 1,000 a second at most, and 100 "
        "at once.",
    )


class AutoscaleSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The conditions under which more workers, or fewer, are advised."""

    enabled: bool = Field(
        default=True,
        description="Off: batches have `RLM_BATCH__MAX_SIZE` requests at any load, a pool of "
        "`--autoscale` keeps its largest size, and no number of workers is advised. "
        "Also `ENABLE_DYNAMIC_SCALING`.",
    )
    cpu_pct: float = Field(
        default=75.0,
        gt=0,
        description="One more worker is advised after CPU was above this for `sustained_s`.",
    )
    memory_pct: float = Field(
        default=80.0,
        gt=0,
        description="One more worker is advised after memory was above this for `sustained_s`.",
    )
    sustained_s: float = Field(
        default=300.0, gt=0, description="Time for which CPU or memory must be above its bound."
    )
    queue_depth: int = Field(
        default=1000,
        ge=1,
        description="One more worker is advised when this number of messages waits.",
    )
    wait_s: float = Field(
        default=30.0,
        gt=0,
        description="One more worker is advised when a message waits longer than this.",
    )
    min_workers: int = Field(
        default=2, ge=1, description="Smallest number of workers that is advised."
    )
    max_workers: int = Field(
        default=10, ge=1, description="Largest number of workers that is advised."
    )
    increment: int = Field(
        default=1, ge=1, description="Number of workers that one step adds or removes."
    )
    cooldown_s: float = Field(default=600.0, ge=0, description="Shortest time between two steps.")
    webhook_url: str = Field(
        default="",
        repr=False,
        description="Each change of the advice is sent here by POST, as JSON; empty: to nobody.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleSettings:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers must be at most max_workers={self.max_workers}")
        return self


class SnapshotSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The comparison of operations with their own past.  The monitor does it, so beat must run."""

    enabled: bool = Field(
        default=True,
        description="Off: no snapshots are taken, and no event reports that an operation became "
        "slower.",
    )
    every_s: float = Field(
        default=60.0, gt=0, description="Interval between two snapshots of an operation that runs."
    )
    keep: int = Field(
        default=240,
        ge=20,
        description="Number of snapshots of an operation that are kept; its present is compared "
        "with them.",
    )
    threshold: float = Field(
        default=0.2,
        gt=0,
        description="Relative increase of the time for an item that raises "
        "`performance.degraded`; 0.2 is 20 %.",
    )
    error_rate: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Share of failed items of an operation between two snapshots above which "
        "`errors.high` is raised, of at least 20 items.",
    )


class AlertSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Alerts: their channels, their thresholds, and the number that is kept."""

    channels: tuple[Literal["log", "webhook", "stdout"], ...] = Field(
        default=("log",),
        description="Channels that alerts are sent to: a JSON list of log, webhook, stdout.",
    )
    webhook_url: str = Field(
        default="",
        repr=False,
        description="Alerts are sent here by POST as JSON, if `webhook` is a channel.",
    )
    webhook_secret: str = Field(
        default="",
        repr=False,
        description="Key that signs webhooks: HMAC-SHA256 of the time and the body, in "
        "X-RLM-Signature.",
    )
    slow_execution_ms: float = Field(
        default=30_000.0,
        gt=0,
        description="An item or a job that takes longer raises `execution.slow`.",
    )
    memory_mb: float = Field(
        default=500.0, gt=0, description="A pool process above this raises `memory.high`."
    )
    cpu_pct: float = Field(default=80.0, gt=0, description="A host above this raises `cpu.high`.")
    history: int = Field(
        default=1000, ge=10, description="Number of alerts, and of events, that are kept."
    )
