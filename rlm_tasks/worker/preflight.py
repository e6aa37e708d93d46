"""What Redis' and Celery's settings do to jobs: lose them, repeat them, keep them from running.

Decides which settings are dangers and says what to do: a worker names them once when it starts, the
doctor tells all that was looked at.  Refuses to stop anybody for them, and to know who is alive.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from redis.exceptions import ResponseError

from resilience.address import tls
from resilience.store import Store
from rlm_tasks.jobs.splitting import LONGEST_RUN
from rlm_tasks.messaging.broker_kinds import broker_kind
from rlm_tasks.settings.model import Settings

OLDEST_REDIS, OLDEST_TESTED = (6, 2), (7, 2)
"""Redis 6.2 brought what is sent to it: ZADD LT (`wake.lua`), ZRANGE REV (`breaker_names.lua`) and
BYSCORE (`sources`, and kombu 5.7, which sends ZADD GT, too).  redis-py 8 is tested with Redis 7.2
and later, which Valkey calls itself, too."""
KOMBU_VISIBILITY_TIMEOUT_S = 3600
"""What a Redis broker uses when nothing is set (kombu 5.7)."""
_JSON = {"json", "application/json"}

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found there in words, and what to do."""

    check: str
    state: State
    found: str
    advice: str = ""  # empty when all is well


def dangers(store: Store, settings: Settings, celery: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each setting that would lose data or repeat work.

    `celery` is the app's configuration.  Raises what Redis raises when it does not answer.
    """
    found = (*of_redis(store, settings), *of_urls(settings), *of_celery(settings, celery))
    return [f"{each.found}. {each.advice}" for each in found if each.state != "ok"]


# --- Redis ------------------------------------------------------------------------------------


def of_redis(store: Store, settings: Settings) -> Iterator[Finding]:
    """Yield what the ledger's server tells of itself; a managed one that does not tell is trusted.

    Raises what Redis raises when it does not answer.
    """
    try:
        info: dict[str, Any] = store.client.info()
    except ResponseError:
        yield Finding(
            "redis", "ok", f"Redis at {store.url} answers; it may not be asked about itself"
        )
        return
    yield _server(store, info)
    yield _eviction(store, info)
    yield _persistence(store, info)
    yield _memory(store, info, settings)


def _server(store: Store, info: Mapping[str, Any]) -> Finding:
    told = str(info.get("redis_version", ""))
    version = tuple(map(int, re.findall(r"\d+", told)[:2]))
    where = f"Redis {told} at {store.url}" if told else f"Redis at {store.url}"
    if info.get("role", "master") != "master":
        return Finding(
            "redis",
            "fault",
            f"{where} is a replica: it takes no writes",
            "Set RLM_REDIS_URL to its primary",
        )
    if info.get("redis_mode") == "cluster":
        advice = "Set RLM_REDIS_URL to a server outside of a cluster"
        return Finding(
            "redis",
            "fault",
            f"{where} is one node of a cluster: it refuses the keys of others",
            advice,
        )
    if version and version < OLDEST_REDIS:
        return Finding(
            "redis",
            "fault",
            f"{where} does not know commands of Redis 6.2 that are sent to it",
            "Install Redis 7.2 or later",
        )
    if version and version < OLDEST_TESTED:
        found = f"{where} is older than what redis-py is tested with"
        return Finding("redis", "warning", found, "Install Redis 7.2 or later")
    return Finding("redis", "ok", f"{where} answers")


def _eviction(store: Store, info: Mapping[str, Any]) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return Finding("eviction", "ok", "no key is evicted (maxmemory-policy noeviction)")
    found = f"Redis at {store.url} evicts keys (maxmemory-policy {policy}): jobs may vanish"
    return Finding("eviction", "fault", found, "Set maxmemory-policy noeviction")


def _persistence(store: Store, info: Mapping[str, Any]) -> Finding:
    if "err" in (info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")):
        found = f"Redis at {store.url} could not write to its disk the last time"
        return Finding(
            "persistence",
            "fault",
            found,
            "Free its disk; its log says why, and redis-cli INFO persistence how it goes",
        )
    if info.get("aof_enabled") == 0 and not _takes_snapshots(store):
        found = f"Redis at {store.url} keeps nothing on disk: a restart loses every job"
        return Finding("persistence", "warning", found, "Set appendonly yes, appendfsync everysec")
    if info.get("aof_enabled") == 0:
        return Finding("persistence", "ok", "snapshots: a crash loses what came after the last one")
    return Finding("persistence", "ok", "an append-only file")


def _takes_snapshots(store: Store) -> bool:
    """Whether snapshots are configured; a managed Redis that does not tell is trusted."""
    try:
        return bool(cast(dict[str, str], store.client.config_get("save")).get("save", ""))
    except ResponseError:
        return True


def _memory(store: Store, info: Mapping[str, Any], settings: Settings) -> Finding:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not most:
        return Finding("memory", "ok", f"{used / 2**20:.0f} MB are used; maxmemory sets no limit")
    _, high, _, emergency = settings.pressure.thresholds
    share = 100 * used / most
    found = f"{used / 2**20:.0f} of {most / 2**20:.0f} MB are used ({share:.0f} %)"
    if share < high:
        return Finding("memory", "ok", found)
    state: State = "fault" if share >= emergency else "warning"
    return Finding(
        "memory",
        state,
        f"Redis at {store.url}: {found}",
        "Raise maxmemory, or lower RLM_RESULT_TTL_S",
    )


def of_urls(settings: Settings) -> Iterator[Finding]:
    """Yield which connections are encrypted for whoever is at the other end."""
    told_by = {
        settings.result_backend: "RLM_RESULT_BACKEND",
        settings.broker_url: "RLM_BROKER_URL",
        settings.redis_url: "RLM_REDIS_URL",
    }
    secured = {name: options for url, name in told_by.items() if (options := tls(url))}
    open_to_all = [
        name for name, options in secured.items() if options["ssl_cert_reqs"] == ssl.CERT_NONE
    ]
    if open_to_all:
        found = f"{', '.join(open_to_all)}: TLS without verification, whoever is in between can read and change everything"
        yield Finding(
            "tls",
            "warning",
            found,
            "Leave out ssl_cert_reqs=none, and name the authority by ssl_ca_certs",
        )
    elif secured:
        yield Finding(
            "tls", "ok", f"{', '.join(secured)}: encrypted, and certificates are verified"
        )


# --- Celery -----------------------------------------------------------------------------------


def of_celery(settings: Settings, celery: Mapping[str, Any]) -> list[Finding]:
    """Return what of an app's configuration loses or repeats work, or lets strangers in; or that
    nothing does.

    What makes a node safe to repeat (acks_late and its kin) is set on the tasks themselves; what
    makes jobs slow or late is told by `conflicts`."""
    found = [*_deliveries(settings, celery), *_ends(celery), *_serializers(celery)]
    return found or [
        Finding(
            "celery", "ok", "JSON only, and no message is delivered again while its node may run"
        )
    ]


def _deliveries(settings: Settings, celery: Mapping[str, Any]) -> Iterator[Finding]:
    timeout, longest = _visibility_timeout_s(celery), _longest_s(settings, celery)
    if timeout is not None and timeout < longest:
        found = (
            f"broker_transport_options visibility_timeout={timeout:g} s is shorter than a node may run ({longest:g} s): "
            "its message is delivered again while it runs"
        )
        yield Finding("celery", "fault", found, f"Raise it above {longest:g}")


def _visibility_timeout_s(celery: Mapping[str, Any]) -> float | None:
    """Return after how long the broker delivers an unacknowledged message again; None where it does
    not.
    """
    if not broker_kind(celery.get("broker_url")).redelivers:
        return None
    return float(
        (celery.get("broker_transport_options") or {}).get(
            "visibility_timeout", KOMBU_VISIBILITY_TIMEOUT_S
        )
    )


def _longest_s(settings: Settings, celery: Mapping[str, Any]) -> float:
    limits = (settings.node.item_limit_s, celery.get("task_time_limit") or 0.0)
    return max(settings.ledger.lease_s, LONGEST_RUN * settings.node.target_ms / 1000, *limits)


def _ends(celery: Mapping[str, Any]) -> Iterator[Finding]:
    if celery.get(name := "worker_cancel_long_running_tasks_on_connection_loss"):
        found = f"{name}=True: running nodes are ended when the broker is away for a moment, and done again"
        yield Finding("celery", "warning", found, f"Set {name}=False")


def _serializers(celery: Mapping[str, Any]) -> Iterator[Finding]:
    accepted = set(celery.get("accept_content") or ["json"])
    if not accepted & _JSON:
        yield Finding(
            "celery",
            "fault",
            f"accept_content={sorted(accepted)} refuses nodes, which are JSON",
            "Add 'json' to it",
        )
    if others := sorted(accepted - _JSON):
        found = f"accept_content takes {', '.join(others)}, too: whoever reaches the broker may run code, if that is a pickle"
        yield Finding("celery", "warning", found, "Set accept_content=['json']")
