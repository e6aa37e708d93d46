"""All settings with defaults and units, as one model.

Every folder reads it; `environment.settings` makes it from the environment.  The variables are
named ``RLM_<FIELD>`` and ``RLM_<SECTION>__<FIELD>``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from resilience.address import SENTINEL, check
from resilience.settings import StoreSettings
from rlm_tasks.settings.llm import LlmSettings
from rlm_tasks.settings.sections import (
    LedgerSettings,
    MetricsSettings,
    NodeSettings,
    TracingSettings,
)
from scheduler.settings import (
    AdmissionSettings,
    AlertSettings,
    AllocationSettings,
    AutoscaleSettings,
    BatchSettings,
    PressureSettings,
    SnapshotSettings,
)


class Settings(StoreSettings):
    """The whole configuration of one process."""

    broker_url: str = Field(
        default="",
        description="Celery's broker, such as `amqp://USER:PASSWORD@HOST:5672/VHOST`; empty: the "
        "ledger's Redis.",
    )
    result_backend: str = Field(
        default="",
        description="Celery's result backend, which counts chords; empty: the ledger's Redis.",
    )
    api_key: SecretStr = Field(
        default=SecretStr(""),
        repr=False,
        description="Key that a request for /metrics or /health on a worker's port must carry "
        "(docs/metrics.md); empty: no key is needed.",
    )
    operations: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Modules with operations, separated by commas; imported by clients and "
        "workers.",
    )
    result_ttl_s: int = Field(
        default=7 * 86_400,
        ge=60,
        description="Results and ledger entries of a job are kept for this long after its end. An "
        "open job is kept in any case.",
    )
    max_result_bytes: int = Field(
        default=256 * 2**20,
        gt=0,
        description="Bytes of the largest output that result() builds in memory, unpacked.",
    )
    max_item_bytes: int = Field(
        default=16 * 2**20,
        gt=0,
        description="Largest size of one packed item, or of one line of a file.",
    )
    max_output_bytes: int = Field(
        default=256 * 2**20,
        gt=0,
        description="Largest size of one packed output, merged partial or answer. Less counts if "
        "Redis takes less (`proto-max-bulk-len`).",
    )
    files_root: str = Field(
        default="",
        description="Folder below which clients and workers may read files that a job names "
        "(`Lines`, `Files`, `code_metrics`); links are followed. Empty: any folder.",
    )
    fault_patterns: int = Field(
        default=50,
        ge=0,
        description="Number of recurring faults that are kept; 0: no faults are kept, and the "
        "success of retries is not counted.",
    )
    show_messages: bool = Field(
        default=False,
        description="Show messages and tracebacks of failures in the command line and Flower; "
        "they may contain items.",
    )
    slots: int = Field(
        default=0,
        ge=0,
        description="Pool processes of a worker; 0: one for each CPU. Also "
        "`WORKFLOW_MAX_CONCURRENT_ACTIVITIES`.",
    )
    ready_file: str = Field(
        default="",
        description="A file that a worker touches when it is ready, for probes; empty: none.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="Format of the logs of workers and beat: `text` for people, `json` for "
        "programs.",
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
        # A key from a file ends in a newline; a header never does.
        return value.strip() if isinstance(value, str) else value

    @field_validator("broker_url", "result_backend")
    @classmethod
    def _can_be_used(cls, value: str, info: ValidationInfo) -> str:
        check(value)
        if value.startswith(SENTINEL) and not info.data.get("sentinel_master"):
            raise ValueError(
                "set RLM_SENTINEL_MASTER to the name under which the sentinels watch the primary"
            )
        return value

    @field_validator("operations", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )
