"""The platform's performance as one dict, under the names that other orchestrators use.

`Client.get_optimization_stats` calls `stats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlm_tasks.client.platform_status import PlatformStatus

_CACHE = "the platform has no result cache"


def stats(status: PlatformStatus, recovery_success_rate: float | None) -> dict[str, Any]:
    """Return the dict that `Client.get_optimization_stats` documents."""
    executions = sum(each["total_executions"] for each in status.operations)
    failures = sum(each["failed_executions"] for each in status.operations)
    busy_ms = sum(each["avg_duration_ms"] * each["total_executions"] for each in status.operations)
    slots, busy = sum(host.slots for host in status.hosts), sum(host.busy for host in status.hosts)
    return {
        "memory": {
            "usage_mb": status.resource_usage["memory_mb"],
            "pressure_level": status.level,
            "object_pool_utilization": round(min(1.0, busy / slots), 3) if slots else 0.0,
        },
        "cache": {"hit_rate": 0.0, "lookups": 0, "note": _CACHE},
        "execution": {
            "avg_time_ms": round(busy_ms / executions, 3) if executions else 0.0,
            "executions": executions,
            "concurrency_level": busy,
        },
        "errors": {
            "error_rate": round(failures / executions, 4) if executions else 0.0,
            "recovery_success_rate": recovery_success_rate,
            "circuit_breakers": {
                name: str(each["state"]) for name, each in status.circuit_breakers.items()
            },
        },
    }
