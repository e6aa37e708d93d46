"""A program of a user who has a strict type checker: each call passes, each mistake is marked.

`test_type_checkers` runs mypy and pyright over this file; nothing else runs it.  A marked line must
be an error of both: a mark without an error fails, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from resilience import (
    Aimd,
    BreakerConfig,
    Elastic,
    Rate,
    RetryPolicy,
    TimeoutSettings,
    execute_with_retry,
    with_retry,
)
from rlm_tasks import (
    Adaptive,
    Binary,
    Budget,
    Client,
    Conditions,
    Context,
    ExecutorPriority,
    Files,
    Job,
    JobRequest,
    JobResult,
    Lines,
    NWay,
    Options,
    Priority,
    ResourceAllocationPolicy,
    ResourceLimits,
    operation,
)
from rlm_tasks.requests import TraceContext
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings, ModelSettings
from rlm_tasks.settings.model import Settings
from rlm_tasks.settings.sections import (
    LedgerSettings,
    MetricsSettings,
    NodeSettings,
    TracingSettings,
)
from scheduler.settings import AdmissionSettings, AlertSettings, AllocationSettings


def total(values: Iterable[float]) -> float:
    return sum(values)


@operation(
    "turnover",
    merge=total,
    breaker=BreakerConfig(failure_threshold=3, recovery_timeout_s=10),
    rate_limit={"requests": Rate(100), "tokens": Rate(90_000, per_s=60)},
    bulkhead=Elastic(4, 8, 2),
    retry=RetryPolicy(max_attempts=3, retry_on=(ConnectionError,)),
    allocation=ResourceAllocationPolicy(executor_id="turnover", priority="high", max_workers=4),
)
def turnover(line: str, context: Context) -> float:
    return float(line.split(",")[context.job == ""])


@operation
def length(text: str) -> int:
    return len(text)


# --- requests -------------------------------------------------------------------------------------

FIRST = JobRequest(
    operation="word_count",
    items=["to be", "or not to be"],
    options=Options(priority="high", timeout=300, continue_on_error=True, error_threshold=0.1),
)
REQUESTS = [
    FIRST,
    JobRequest(operation=turnover, items=Lines("orders.csv")),
    JobRequest(operation="sum", items=range(10), type="parallel", chunk_size=5),
    JobRequest(operation="sum", items=Files("*.txt"), strategy="binary", params={"a": [1, None]}),
    JobRequest(operation="sum", items=[], strategy=Binary(min_chunk_size=1, max_depth=3)),
    JobRequest(operation="sum", items=(), strategy=NWay(split_factor=8)),
    JobRequest(
        operation="sum", items=(), strategy=Adaptive(), description="a", complexity="simple"
    ),
    JobRequest(operation="sum", items=(), options={"priority": "low"}, conditions={}),
    JobRequest(operation="sum", items=(), conditions=Conditions(skip_if_empty=True)),
]
OPTIONS = [
    Options(),
    Options(priority=Priority.CRITICAL, timeout=timedelta(minutes=5), overload="delay"),
    Options(timeout_ms=2000, queue_timeout="priority", preempt_lower_priority=False),
    Options(queue_timeout=timedelta(seconds=3), budget=Budget(money=2, tokens=10_000, calls=5)),
    Options(budget={"money": 2}, emit_metrics={"rows": 5, "country": "be"}, max_depth=2),
    Options(idempotency_key="k", cache_results=True, cache_ttl_seconds=60),
    Options(trace_context=TraceContext(trace_id="ab", parent_span_id="cd", sampled=False)),
    Options(trace_context="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
]

Options(priorty="high")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Options(priority="urgent")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Options(chunk_size=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Budget(token=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Adaptive(branching=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Conditions(skip_if_emty=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
JobRequest(operation="sum")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
JobRequest(operation=len, items=[])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
TraceContext()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

# --- settings and policies ------------------------------------------------------------------------

SETTINGS = Settings(
    redis_url="redis://localhost/5",
    operations=("shop",),
    node=NodeSettings(target_ms=500),
    ledger=LedgerSettings(lease_s=10),
    tracing=TracingSettings(enabled=True),
    metrics=MetricsSettings(address="127.0.0.1:9000"),
    admission=AdmissionSettings(max_jobs=100, overload="delay"),
    alerts=AlertSettings(channels=("log", "webhook")),
    allocation=AllocationSettings(max_workers=8),
    llm=LlmSettings(
        endpoints=(EndpointSettings(name="a", base_url="http://localhost:1"),),
        models={"gpt-4.1": ModelSettings(input_price=2.0)},
        routing="least_connections",
    ),
)
POLICIES = [
    RetryPolicy(),
    RetryPolicy(max_attempts=3, initial_delay_s=0.1, retryable_errors=("TIMEOUT",)),
]
LIMITS = [ResourceLimits(), ResourceLimits(max_workers=3)]
ALLOCATIONS = [
    ResourceAllocationPolicy(operation="turnover", priority=ExecutorPriority.LOW),
    ResourceAllocationPolicy(executor_id="turnover", priority="critical", is_memory_intensive=True),
]
TIMEOUTS = TimeoutSettings(simple_s=10)
BOUND = Aimd(10)

RetryPolicy(max_atempts=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
BreakerConfig(failure_treshold=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

# --- a client -------------------------------------------------------------------------------------


def use(client: Client) -> tuple[Job, JobResult]:
    client.submit(FIRST)
    client.submit(FIRST, idempotency_key="again")
    client.submit({"operation": "sum", "items": [1, 2], "chunkSize": 1})
    client.submit(operation=length, items=["a"], priority="high", skip_if_empty=True)
    client.submit(operation="sum", input={"items": [1]}, strategy=NWay(), timeout=5)
    client.submit(operation="sum", items=[1], continue_on_error=True, options={"budget": None})
    client.execute(operation="sum", items=[1], timeout=5, budget=Budget(calls=5))
    client.execute_with_retry(FIRST, RetryPolicy(max_attempts=2), timeout=5)
    client.execute_with_retry(operation="sum", items=[1], policy=3, idempotency_key="k")
    client.batch_submit([FIRST, {"operation": "sum", "items": [1]}])
    client.plan(operation="sum", items=[1], timeout=timedelta(seconds=3))
    turnover.submit(Lines("orders.csv"), priority="low", params={"year": 2026}).get(timeout=5)

    client.submit(operation="sum", items=[1], priorty="high")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.submit(operation="sum", items=[1], priority="urgent")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.execute(operation="sum", items=[1], continue_on_eror=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    turnover.submit(["a,1"], prioritty="low")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    return client.submit(FIRST), client.execute(FIRST)


@with_retry(max_attempts=3)
def read(path: str) -> str:
    return execute_with_retry(path.upper, policy={"maxRetries": 5})
