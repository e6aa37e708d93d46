"""Everything that can be tuned, with its default and unit, and the one place that reads the environment.

Names: ``RLM_<FIELD>`` and ``RLM_<SECTION>__<FIELD>``.  Refuses to know what the values are used for.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from resilience.address import SENTINEL, check
from resilience.settings import StoreSettings
from rlm_tasks.errors import InvalidSettings
from rlm_tasks.settings.llm import LlmSettings
from scheduler.settings import (
    AdmissionSettings,
    AlertSettings,
    AllocationSettings,
    AutoscaleSettings,
    BatchSettings,
    PressureSettings,
    SnapshotSettings,
)


class LedgerSettings(BaseModel, frozen=True, extra="forbid"):
    """How fast a lost worker or message is noticed."""

    lease_s: float = Field(30.0, gt=0, description="A running node is lost when nobody beats for this long.")
    sweep_s: float = Field(5.0, gt=0, description="How often each worker looks for overdue nodes.")
    grace_s: float | None = Field(
        None, gt=0, description="A queued node's message is looked for after this long; empty: as long as `sweep_s`."
    )
    stop_grace_s: float = Field(2.0, gt=0, description="Running nodes of an ended job are fenced after this.")
    death_limit: int = Field(3, ge=1, description="An item that was in flight at this many deaths is quarantined.")

    @property
    def grace(self) -> float:
        """Seconds a message may take before somebody looks for it."""
        return self.sweep_s if self.grace_s is None else self.grace_s


class NodeSettings(BaseModel, frozen=True, extra="forbid"):
    """How a node works through its range."""

    target_ms: float = Field(1000.0, gt=0, description="A node hands over the rest of its range after this.")
    slice_ms: float = Field(50.0, gt=0, description="A node may cut after each slice of about this long.")
    pulse_ms: float = Field(250.0, gt=0, description="A running node tells and asks the ledger about this often.")
    item_limit_s: float = Field(
        0.0,
        ge=0,
        description="No item may run longer, whatever was learned; 0: as `adaptive_timeouts` says. Also `WORKFLOW_ACTIVITY_TIMEOUT_MINUTES`.",
    )
    timeout_multipliers: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Operations whose items may take longer, or less long, than their complexity says: JSON, name -> factor."
    )
    adaptive_timeouts: bool = Field(
        True,
        description="Stop an item that runs longer than its complexity and its operation's p99 allow, 3 h at most. Also `ENABLE_ADAPTIVE_TIMEOUTS`.",
    )


class MetricsSettings(BaseModel, frozen=True, extra="forbid"):
    """Where a worker answers for itself; its port is an option of ``celery worker``, for each has its own."""

    address: str = Field(
        "127.0.0.1",
        description="Address of a worker's `--metrics-port`; `0.0.0.0`: every interface, where only `RLM_API_KEY` asks who it is.",
    )


class TracingSettings(BaseModel, frozen=True, extra="forbid"):
    """Which jobs become traces; where those go is said by OpenTelemetry's own variables."""

    enabled: bool = Field(
        False, description="Workers tell of jobs and nodes in OpenTelemetry spans (docs/tracing.md); needs the extra `otel`."
    )
    sample_rate: float = Field(
        0.1, ge=0, le=1, description="Share of jobs that are traced; one that is submitted under a trace follows that."
    )


class Settings(StoreSettings):
    """The whole configuration of one process."""

    broker_url: str = Field(
        "", description="Celery's broker, such as `amqp://USER:PASSWORD@HOST:5672/VHOST`; empty: the ledger's Redis."
    )
    result_backend: str = Field("", description="Celery's result backend, which counts chords; empty: the ledger's Redis.")
    api_key: SecretStr = Field(
        SecretStr(""),
        repr=False,
        description="Who asks a worker's port for /metrics or /health shows this key (docs/metrics.md); empty: nobody is asked.",
    )
    operations: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Modules with operations, separated by commas; imported by clients and workers."
    )
    result_ttl_s: int = Field(7 * 86_400, gt=0, description="Results and ledger entries of a job live this long.")
    max_result_bytes: int = Field(64 * 2**20, gt=0, description="Largest packed output that result() builds in memory.")
    max_item_bytes: int = Field(16 * 2**20, gt=0, description="Largest single packed item.")
    fault_patterns: int = Field(50, ge=0, description="Recurring faults that are kept; 0: none, nor whether retries have helped.")
    slots: int = Field(
        0, ge=0, description="Pool processes of a worker; 0: as many as it has CPUs. Also `WORKFLOW_MAX_CONCURRENT_ACTIVITIES`."
    )
    ready_file: str = Field("", description="A file that a worker touches when it is ready, for probes; empty: none.")
    log_format: Literal["text", "json"] = Field(
        "text", description="How workers and beat write their log: lines to read, or JSON."
    )
    ledger: LedgerSettings = LedgerSettings()
    node: NodeSettings = NodeSettings()
    pressure: PressureSettings = PressureSettings()
    admission: AdmissionSettings = AdmissionSettings()
    allocation: AllocationSettings = AllocationSettings()
    batch: BatchSettings = BatchSettings()
    autoscale: AutoscaleSettings = AutoscaleSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    alerts: AlertSettings = AlertSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    llm: LlmSettings = LlmSettings()

    def model_post_init(self, _context: Any) -> None:
        """Let the broker and the result backend default to the ledger's Redis."""
        object.__setattr__(self, "broker_url", self.broker_url or self.redis_url)
        object.__setattr__(self, "result_backend", self.result_backend or self.redis_url)

    @field_validator("api_key", mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return value.strip() if isinstance(value, str) else value  # files end in a line end, headers never do

    @field_validator("broker_url", "result_backend")
    @classmethod
    def _can_be_used(cls, value: str, told: ValidationInfo) -> str:
        check(value)
        if value.startswith(SENTINEL) and not told.data.get("sentinel_master"):
            raise ValueError("give the name that the sentinels watch the primary by as RLM_SENTINEL_MASTER")
        return value

    @field_validator("operations", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def traces_exporters() -> list[str]:
    """Return the exporters that OpenTelemetry's variables name; its packages read the others, this one is for their launcher."""
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    otlp = _OTLP.get(os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or protocol, protocol)
    names = (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").replace(" ", "").split(",")
    return [otlp if name == "otlp" else name for name in names if name != "none"]


def key_of(variable: str) -> str:
    """Return the key of a provider, which its own variable holds; '' when that is not set."""
    return os.environ.get(variable, "").strip()


@cache
def settings() -> Settings:
    """Return the settings of this process, read from the environment once.

    Raises InvalidSettings naming each variable that is unknown, or whose value cannot be used.
    """
    from rlm_tasks.settings.document import validate

    if issues := validate(os.environ):
        raise InvalidSettings(issues)
    return Settings()
