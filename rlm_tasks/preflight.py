"""What would lose data, said once when a worker starts.

Decides which settings of Redis and Celery are dangers and says what to do; refuses to stop anybody for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from redis.exceptions import ResponseError

from resilience.store import Store
from rlm_tasks.settings import Settings

KOMBU_VISIBILITY_TIMEOUT_S = 3600
"""What a Redis broker uses when nothing is set (kombu 5.7)."""


def dangers(store: Store, settings: Settings, celery: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each setting that would lose data or repeat work.

    `celery` is the app's configuration.  Raises what Redis raises when it does not answer.
    """
    info = _info(store)
    found = []
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(
            f"Redis at {store.url} evicts keys (maxmemory-policy {policy}): jobs may vanish. Set maxmemory-policy noeviction"
        )
    if info.get("aof_enabled") == 0 and not _takes_snapshots(store):
        found.append(
            f"Redis at {store.url} keeps nothing on disk: a restart loses every job. Set appendonly yes, appendfsync everysec"
        )
    timeout, longest = _visibility_timeout_s(celery), _longest_s(settings, celery)
    if timeout is not None and timeout < longest:
        found.append(
            f"broker_transport_options visibility_timeout={timeout:g} s is shorter than a node may run ({longest:g} s): "
            "its message is delivered again while it runs. Raise it"
        )
    return found


def _info(store: Store) -> dict[str, Any]:
    """Return what the server tells of itself; nothing where it may not be asked."""
    try:
        return store.client.info()
    except ResponseError:
        return {}


def _takes_snapshots(store: Store) -> bool:
    """Whether snapshots are configured; a managed Redis that does not tell is trusted."""
    try:
        return bool(cast(dict[str, str], store.client.config_get("save")).get("save", ""))
    except ResponseError:
        return True


def _visibility_timeout_s(celery: Mapping[str, Any]) -> float | None:
    """Return after how long the broker delivers an unacknowledged message again; None where it does not."""
    if not str(celery.get("broker_url") or "").startswith(("redis", "valkey", "sentinel")):
        return None
    return float((celery.get("broker_transport_options") or {}).get("visibility_timeout", KOMBU_VISIBILITY_TIMEOUT_S))


def _longest_s(settings: Settings, celery: Mapping[str, Any]) -> float:
    limits = (settings.node.item_limit_s, celery.get("task_time_limit") or 0.0)
    return max(settings.ledger.lease_s, 4 * settings.node.target_ms / 1000, *limits)
