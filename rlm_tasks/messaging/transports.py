"""What Celery has to know of the Redis and the RabbitMQ it speaks to, derived from one URL each.

Decides how TLS and sentinels, which a URL of ours says, are said in Celery's settings, and what
keeps platforms apart on each kind of broker.  Refuses to connect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

from resilience.address import SENTINEL, SOCKET, credentials, hosts, tls, without_tls_options
from resilience.keys import Keys
from rlm_tasks.settings.model import Settings

VISIBILITY_TIMEOUT_S = 4 * 3600
"""Longer than any node runs: lost work is recovered by the ledger's sweep, not by redelivery."""
QUEUE_ORDER = "rlm_tasks.worker.queue_order:QueueOrder"
ANSWER_S, WATCHED_ANSWER_S = 30, 5
"""A Redis may take so long to answer; where sentinels can name another, one that hangs is left
sooner.
"""
_AMQP_NAMES = {
    "ssl_ca_certs": "ca_certs",
    "ssl_certfile": "certfile",
    "ssl_keyfile": "keyfile",
    "ssl_cert_reqs": "cert_reqs",
}


# --- broker and result backend ----------------------------------------------------------------


def redis_broker(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings of a Redis as the broker."""
    url = settings.broker_url
    return {
        "broker_url": _celerys(url),
        **({"broker_use_ssl": secured} if (secured := tls(url)) else {}),
        "broker_transport_options": {
            "socket_timeout": _answer_s(url),
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "queue_order_strategy": QUEUE_ORDER,
            "priority_steps": [0],
            "global_keyprefix": Keys(settings.namespace).prefix,
            **_watched(settings, url),
        },
    }


def amqp_broker(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings of RabbitMQ, or another AMQP server, as the broker.

    Redis has a prefix before each key; here the names that all apps of a virtual host would share
    are named after the platform.
    """
    url = settings.broker_url
    return {
        "broker_url": without_tls_options(url),
        **({"broker_use_ssl": _amqp_tls(url)} if tls(url) else {}),
        "control_exchange": settings.namespace,
        "event_exchange": f"{settings.namespace}.events",
    }


def result_backend(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings of the result backend."""
    url = settings.result_backend
    return {
        "result_backend": _celerys(url),
        **({"redis_backend_use_ssl": tls(url)} if tls(url) else {}),
        "result_backend_transport_options": {
            "global_keyprefix": Keys(settings.namespace).prefix,
            **_watched(settings, url),
        },
        "redis_socket_timeout": _answer_s(url),
        "redis_socket_connect_timeout": 5,
        "redis_socket_keepalive": not url.startswith(SOCKET),
    }


def _answer_s(url: str) -> int:
    return WATCHED_ANSWER_S if url.startswith(SENTINEL) else ANSWER_S


def _amqp_tls(url: str) -> dict[str, Any]:
    """Return the TLS options of a URL as RabbitMQ's client names them."""
    options = dict(tls(url) or {})
    # None: the host name of the URL.
    by_name = {"server_hostname": None} if options.pop("ssl_check_hostname") else {}
    return {**{_AMQP_NAMES[name]: value for name, value in options.items()}, **by_name}


def _celerys(url: str) -> str:
    """Return a URL as Celery takes it: each sentinel has the password and the database, for it may
    be asked first.
    """
    if url.startswith(SOCKET):
        return url.replace(SOCKET, "redis+socket://", 1).replace("?db=", "?virtual_host=", 1)
    if not url.startswith(SENTINEL):
        return without_tls_options(url)
    first = urlsplit(without_tls_options(url.split(";")[0]))
    who = f"{first.netloc.rpartition('@')[0]}@" if "@" in first.netloc else ""
    return ";".join(
        first._replace(netloc=f"{who}{host}:{port}").geturl() for host, port in hosts(url)
    )


def _watched(settings: Settings, url: str) -> dict[str, Any]:
    """Return the transport options by which Celery finds the primary."""
    if not url.startswith(SENTINEL):
        return {}
    options = replace(settings.address, url=url).sentinel_options()
    return {"master_name": settings.sentinel_master, "sentinel_kwargs": options}


# --- redbeat ----------------------------------------------------------------------------------


def redbeat(settings: Settings) -> dict[str, Any]:
    """Return the settings by which celery-redbeat finds the ledger's Redis.

    The password stands apart from the URL: ``celery inspect conf`` shows the one and hides the
    other."""
    url = settings.redis_url
    secured = {"redbeat_redis_use_ssl": options} if (options := tls(url)) else {}
    if not url.startswith(SENTINEL):
        plain, password = _password_apart(without_tls_options(url))
        return {"redbeat_redis_url": plain, "redbeat_redis_options": password, **secured}
    found = {"sentinels": hosts(url), "service_name": settings.sentinel_master, "socket_timeout": 5}
    options = {**found, **credentials(url), "sentinel_kwargs": settings.address.sentinel_options()}
    return {"redbeat_redis_url": "redis-sentinel://", "redbeat_redis_options": options, **secured}


def _password_apart(url: str) -> tuple[str, dict[str, str]]:
    parts = urlsplit(url)
    if not parts.password:
        return url, {}
    who, _, where = parts.netloc.rpartition("@")
    user = who.partition(":")[0]
    return parts._replace(netloc=f"{user}@{where}" if user else where).geturl(), {
        "password": unquote(parts.password)
    }
