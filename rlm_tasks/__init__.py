"""Jobs that split themselves while they run, on Celery and Redis: the names that users import.

    from rlm_tasks import Client, operation

The names below are stable.  They load on first use, so importing the package costs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlm_tasks.lazy import lazy
from rlm_tasks.operations.ports import submit_with
from rlm_tasks.version import __version__ as __version__

if TYPE_CHECKING:
    from resilience.breaker_storage import CircuitBreakerConfig as CircuitBreakerConfig
    from resilience.budget import Spending as Spending
    from resilience.degradation import Level as Level
    from resilience.degradation import ResourceConstraints as ResourceConstraints
    from resilience.degradation import ResourcePressureLevel as ResourcePressureLevel
    from rlm_tasks.celery import app as app
    from rlm_tasks.client.client import Client as Client
    from rlm_tasks.client.job import Job as Job
    from rlm_tasks.client.planning import Estimate as Estimate
    from rlm_tasks.client.planning import Plan as Plan
    from rlm_tasks.client.planning import PlannedRound as PlannedRound
    from rlm_tasks.client.planning import Sufficiency as Sufficiency
    from rlm_tasks.compat.alert_manager import ResourceAlertManager as ResourceAlertManager
    from rlm_tasks.compat.optimization_config import OptimizationConfig as OptimizationConfig
    from rlm_tasks.compat.resource_manager import AdaptiveResourceManager as AdaptiveResourceManager
    from rlm_tasks.compat.resource_manager import ResourceAwareExecutor as ResourceAwareExecutor
    from rlm_tasks.compat.resource_manager import create_resource_manager as create_resource_manager
    from rlm_tasks.compat.resource_manager import get_resource_status as get_resource_status
    from rlm_tasks.compat.resource_manager import (
        integrate_with_orchestrator as integrate_with_orchestrator,
    )
    from rlm_tasks.compat.resource_manager import reset_circuit_breakers as reset_circuit_breakers
    from rlm_tasks.compat.resource_manager import wrap_method_executor as wrap_method_executor
    from rlm_tasks.errors import InvalidRequest as InvalidRequest
    from rlm_tasks.errors import ItemError as ItemError
    from rlm_tasks.errors import ItemsUnreadable as ItemsUnreadable
    from rlm_tasks.errors import JobCancelled as JobCancelled
    from rlm_tasks.errors import JobExpired as JobExpired
    from rlm_tasks.errors import JobFailed as JobFailed
    from rlm_tasks.errors import JobNotFound as JobNotFound
    from rlm_tasks.errors import Overloaded as Overloaded
    from rlm_tasks.errors import QueueFull as QueueFull
    from rlm_tasks.errors import ResultTimeout as ResultTimeout
    from rlm_tasks.errors import ResultTooLarge as ResultTooLarge
    from rlm_tasks.errors import RlmError as RlmError
    from rlm_tasks.errors import StoreFull as StoreFull
    from rlm_tasks.errors import StoreReadOnly as StoreReadOnly
    from rlm_tasks.errors import StoreUnauthorised as StoreUnauthorised
    from rlm_tasks.errors import StoreUnavailable as StoreUnavailable
    from rlm_tasks.errors import UnknownOperation as UnknownOperation
    from rlm_tasks.installation import install as install
    from rlm_tasks.jobs.items import Files as Files
    from rlm_tasks.jobs.items import Lines as Lines
    from rlm_tasks.jobs.rounds import NextRound as NextRound
    from rlm_tasks.jobs.rounds import Round as Round
    from rlm_tasks.jobs.splitting import estimate_optimal_chunk_size as estimate_optimal_chunk_size
    from rlm_tasks.operations.context import Context as Context
    from rlm_tasks.operations.registry import operation as operation
    from rlm_tasks.requests import Adaptive as Adaptive
    from rlm_tasks.requests import Binary as Binary
    from rlm_tasks.requests import Budget as Budget
    from rlm_tasks.requests import Conditions as Conditions
    from rlm_tasks.requests import JobRequest as JobRequest
    from rlm_tasks.requests import NWay as NWay
    from rlm_tasks.requests import Options as Options
    from rlm_tasks.requests import Priority as Priority
    from rlm_tasks.results import ItemFailure as ItemFailure
    from rlm_tasks.results import JobResult as JobResult
    from rlm_tasks.results import Partial as Partial
    from rlm_tasks.results import Progress as Progress
    from rlm_tasks.results import Receipt as Receipt
    from rlm_tasks.results import Status as Status
    from scheduler.alerts import AlertChannel as AlertChannel
    from scheduler.alerts import ResourcePressureEvent as ResourcePressureEvent
    from scheduler.allocation import ExecutorPriority as ExecutorPriority
    from scheduler.allocation import ResourceAllocationPolicy as ResourceAllocationPolicy
    from scheduler.allocation import ResourceLimits as ResourceLimits

_HOMES = {
    "rlm_tasks.celery": "app",
    "rlm_tasks.client.client": "Client",
    "rlm_tasks.errors": "InvalidRequest ItemError ItemsUnreadable JobCancelled JobExpired "
    "JobFailed JobNotFound Overloaded QueueFull ResultTimeout ResultTooLarge RlmError StoreFull "
    "StoreReadOnly StoreUnauthorised StoreUnavailable UnknownOperation",
    "rlm_tasks.installation": "install",
    "rlm_tasks.client.job": "Job",
    "rlm_tasks.operations.registry": "Context operation",
    "rlm_tasks.compat.optimization_config": "OptimizationConfig",
    "rlm_tasks.client.planning": "Estimate Plan PlannedRound Sufficiency",
    "rlm_tasks.requests": "Adaptive Binary Budget Conditions JobRequest NWay Options Priority",
    "rlm_tasks.results": "ItemFailure JobResult Partial Progress Receipt Status",
    "rlm_tasks.compat.alert_manager": "ResourceAlertManager",
    "rlm_tasks.compat.resource_manager": "AdaptiveResourceManager ResourceAwareExecutor "
    "create_resource_manager get_resource_status "
    "integrate_with_orchestrator reset_circuit_breakers wrap_method_executor",
    "rlm_tasks.engine.rounds": "NextRound Round",
    "rlm_tasks.jobs.items": "Files Lines",
    "rlm_tasks.jobs.splitting": "estimate_optimal_chunk_size",
    "resilience.budget": "Spending",
    "resilience.breaker_storage": "CircuitBreakerConfig",
    "resilience.degradation": "Level ResourceConstraints ResourcePressureLevel",
    "scheduler.alerts": "AlertChannel ResourcePressureEvent",
    "scheduler.allocation": "ExecutorPriority ResourceAllocationPolicy ResourceLimits",
}
_load, __dir__, __all__ = lazy(__name__, _HOMES)


def _submit(**request: Any) -> Job:
    from rlm_tasks.client.client import default_client

    return default_client().submit(**request)


submit_with(_submit)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except (ImportError, OSError) as error:
        from rlm_tasks.import_path import HOME, found_instead

        if not (shadowed := found_instead()):
            raise
        name, file = next(iter(shadowed.items()))
        advice = f"rename that package, or set PYTHONPATH={HOME} before its folder"
        raise ImportError(
            f"`import {name}` finds {file}, not the platform's own in {HOME}; {advice}"
        ) from error
