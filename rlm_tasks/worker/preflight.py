"""Checks of settings of Redis and Celery that lose jobs, repeat them, or keep them from running.

The supervisor logs the problems once at a worker's start (`warnings`); the doctor prints all
findings.  No finding stops a worker.  Begin with `of_redis` and `of_celery`.
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
"""Redis 6.2 is the first with the commands that the platform sends.

- ZADD LT (`wake.lua`), ZRANGE REV (`breaker_names.lua`) and BYSCORE (`sources`).
- ZADD GT, which kombu 5.7 sends.

redis-py 8 is tested with Redis 7.2 and later; Valkey reports 7.2 or later, too.
"""
KOMBU_VISIBILITY_TIMEOUT_S = 3600
"""The visibility timeout of a Redis broker when none is set (kombu 5.7)."""
_JSON = {"json", "application/json"}

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, in words, with advice."""

    check: str
    state: State
    found: str
    advice: str = ""  # empty when the state is ok


def warnings(store: Store, settings: Settings, celery: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each setting that would lose data or repeat work.

    `celery` is the app's configuration.  Raises the error of redis-py when Redis does not answer.
    """
    found = (*of_redis(store, settings), *of_urls(settings), *of_celery(settings, celery))
    return [f"{each.found}. {each.advice}" for each in found if each.state != "ok"]


# --- Redis ------------------------------------------------------------------------------------


def of_redis(store: Store, settings: Settings) -> Iterator[Finding]:
    """Yield the findings on the ledger's server; a managed one that hides its state is trusted.

    Raises the error of redis-py when Redis does not answer.
    """
    try:
        info: dict[str, Any] = store.client.info()
    except ResponseError:
        yield Finding(
            "redis", "ok", f"Redis at {store.url} answers; its user may not run INFO on it"
        )
        return
    yield _server(store, info)
    yield _eviction(store, info)
    yield _persistence(store, info)
    yield _memory(store, info, settings)


def _server(store: Store, info: Mapping[str, Any]) -> Finding:
    text = str(info.get("redis_version", ""))
    version = tuple(map(int, re.findall(r"\d+", text)[:2]))
    where = f"Redis {text} at {store.url}" if text else f"Redis at {store.url}"
    if info.get("role", "master") != "master":
        return Finding(
            "redis",
            "fault",
            f"{where} is a replica: it takes no writes",
            "Set RLM_REDIS_URL to its primary",
        )
    # Valkey 9 has renamed the field.
    modes = {info.get("redis_mode"), info.get("server_mode")}
    if "cluster" in modes or info.get("cluster_enabled") == 1:
        advice = "Set RLM_REDIS_URL to a server outside of a cluster"
        return Finding(
            "redis",
            "fault",
            f"{where} is one node of a cluster: it refuses keys of other nodes",
            advice,
        )
    if version and version < OLDEST_REDIS:
        return Finding(
            "redis",
            "fault",
            f"{where} lacks commands of Redis 6.2, which the platform sends",
            "Install Redis 7.2 or later",
        )
    if version and version < OLDEST_TESTED:
        found = f"{where} is older than the versions that redis-py is tested with"
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
        found = f"Redis at {store.url} could not write to its disk at its last attempt"
        return Finding(
            "persistence",
            "fault",
            found,
            "Free disk space; its log has the reason, and redis-cli INFO persistence the state",
        )
    if info.get("aof_enabled") == 0 and not _takes_snapshots(store):
        found = f"Redis at {store.url} keeps nothing on disk: a restart loses every job"
        return Finding("persistence", "warning", found, "Set appendonly yes, appendfsync everysec")
    if info.get("aof_enabled") == 0:
        return Finding(
            "persistence", "ok", "snapshots: a crash loses the changes after the last one"
        )
    return Finding("persistence", "ok", "an append-only file")


def _takes_snapshots(store: Store) -> bool:
    """Whether snapshots are configured; a managed Redis that hides it is trusted."""
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
        "Raise maxmemory; to keep results of new jobs for less time, lower RLM_RESULT_TTL_S",
    )


def of_urls(settings: Settings) -> Iterator[Finding]:
    """Yield a finding on the connections with TLS, if there are any."""
    variables = {
        settings.result_backend: "RLM_RESULT_BACKEND",
        settings.broker_url: "RLM_BROKER_URL",
        settings.redis_url: "RLM_REDIS_URL",
    }
    secured = {name: options for url, name in variables.items() if (options := tls(url))}
    unverified = [
        name for name, options in secured.items() if options["ssl_cert_reqs"] == ssl.CERT_NONE
    ]
    if unverified:
        found = (
            f"{', '.join(unverified)}: TLS without verification, "
            "so an attacker in between can read and change everything"
        )
        yield Finding(
            "tls",
            "warning",
            found,
            "Remove ssl_cert_reqs=none, and set ssl_ca_certs to the file of the authority",
        )
    elif secured:
        yield Finding(
            "tls", "ok", f"{', '.join(secured)}: encrypted, and certificates are verified"
        )


# --- Celery -----------------------------------------------------------------------------------


def of_celery(settings: Settings, celery: Mapping[str, Any]) -> list[Finding]:
    """Return the findings on settings of an app that lose or repeat work, or let strangers in.

    Without a problem it is one finding that says so.  The tasks themselves set the options that
    make a node safe to repeat, such as acks_late.  `conflicts` reports settings that slow jobs.
    """
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
            f"broker_transport_options visibility_timeout={timeout:g} s is shorter "
            f"than a node may run ({longest:g} s): its message is delivered again while it runs"
        )
        yield Finding("celery", "fault", found, f"Raise it above {longest:g}")


def _visibility_timeout_s(celery: Mapping[str, Any]) -> float | None:
    """Return the seconds after which the broker delivers an unacknowledged message again.

    None for a broker that does not.
    """
    if not broker_kind(celery.get("broker_url")).redelivers:
        return None
    return float(
        (celery.get("broker_transport_options") or {}).get(
            "visibility_timeout", KOMBU_VISIBILITY_TIMEOUT_S
        )
    )


def _longest_s(settings: Settings, celery: Mapping[str, Any]) -> float:
    """Return the longest time for which a node may run, in seconds."""
    limits = (settings.node.item_limit_s, celery.get("task_time_limit") or 0.0)
    return max(settings.ledger.lease_s, LONGEST_RUN * settings.node.target_ms / 1000, *limits)


def _ends(celery: Mapping[str, Any]) -> Iterator[Finding]:
    if celery.get(name := "worker_cancel_long_running_tasks_on_connection_loss"):
        found = f"{name}=True: running nodes are ended and repeated on each loss of the broker"
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
        found = (
            f"accept_content also takes {', '.join(others)}: "
            "with pickle, anybody who reaches the broker can run code in this worker"
        )
        yield Finding("celery", "warning", found, "Set accept_content=['json']")
