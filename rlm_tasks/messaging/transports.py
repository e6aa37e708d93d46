"""Celery's settings of the broker and the result backend, derived from one URL each.

`broker_kinds` and `rlm_tasks.celery` call it.  It translates TLS options and sentinels of our URLs
into Celery's settings, and adds the prefixes that separate platforms on one server.  It opens no
connection.  `leave_old_primaries` makes kombu and Celery follow a failover.  Begin with
`redis_broker`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from resilience.address import (
    SENTINEL,
    SOCKET,
    credentials,
    hosts,
    mixed,
    tls,
    without_tls_options,
)
from resilience.connections import MOVED, WatchfulConnection
from resilience.keys import Keys
from rlm_tasks.settings.model import Settings

VISIBILITY_TIMEOUT_S = 4 * 3600
"""Longer than any node runs, because the ledger's sweep recovers lost work, and not redelivery."""
QUEUE_ORDER = "rlm_tasks.worker.queue_order:QueueOrder"
ANSWER_S = 5
"""Longest wait for an answer of Redis."""
HEALTH_S = 3
"""Seconds between kombu's checks of its open connections.

It drops a connection that listens to queues and got no answer for this time and one second.
"""
LATE_S = 1.0
"""After a connection was forgotten, kombu's wait for messages may end so much later than agreed."""
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
        "broker_url": _celery_url(url),
        **({"broker_use_ssl": secured} if (secured := tls(url)) else {}),
        "broker_transport_options": {
            "socket_timeout": ANSWER_S,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_S,
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "queue_order_strategy": QUEUE_ORDER,
            "priority_steps": [0],
            "global_keyprefix": Keys(settings.namespace).prefix,
            **_sentinel_options(settings, url),
        },
    }


def amqp_broker(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings of RabbitMQ, or another AMQP server, as the broker.

    On Redis each key has a prefix.  Here the exchanges, which all apps of a virtual host would
    share, are named after the platform.
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
        "result_backend": _celery_url(url),
        **({"redis_backend_use_ssl": tls(url)} if tls(url) else {}),
        "result_backend_transport_options": {
            "global_keyprefix": Keys(settings.namespace).prefix,
            **_sentinel_options(settings, url),
        },
        "redis_socket_timeout": ANSWER_S,
        "redis_socket_connect_timeout": 5,
        "redis_socket_keepalive": not url.startswith(SOCKET),
    }


def _amqp_tls(url: str) -> dict[str, Any]:
    """Return the TLS options of a URL under the names of RabbitMQ's client."""
    options = dict(tls(url) or {})
    # None: the host name of the URL.
    by_name = {"server_hostname": None} if options.pop("ssl_check_hostname") else {}
    return {**{_AMQP_NAMES[name]: value for name, value in options.items()}, **by_name}


def _celery_url(url: str) -> str:
    """Return a URL in Celery's form.

    Each sentinel's URL has the password and the database, because Celery may use any of them first.
    """
    if url.startswith(SOCKET):
        return url.replace(SOCKET, "redis+socket://", 1).replace("?db=", "?virtual_host=", 1)
    if not url.startswith(SENTINEL):
        return without_tls_options(url)
    first = urlsplit(without_tls_options(url.split(";")[0]))
    user = f"{first.netloc.rpartition('@')[0]}@" if "@" in first.netloc else ""
    return ";".join(
        first._replace(netloc=f"{user}{host}:{port}").geturl() for host, port in hosts(url)
    )


def _sentinel_options(settings: Settings, url: str) -> dict[str, Any]:
    """Return the transport options by which Celery finds the primary."""
    if not url.startswith(SENTINEL):
        return {}
    options = replace(settings.address, url=url).sentinel_options()
    return {"master_name": settings.sentinel_master, "sentinel_kwargs": options}


# --- failover ---------------------------------------------------------------------------------


class FollowingConnection(WatchfulConnection):
    """The part of a connection of Celery's result backend that leaves an old primary."""

    heeds = MOVED.__contains__

    @property
    def silence_s(self) -> float:
        """The longest silence; longer timeouts are not watched, as an app's commands may block."""
        silence_s = super().silence_s
        return silence_s if silence_s <= 2 * ANSWER_S else 0.0


class BrokerConnection(FollowingConnection):
    """The part of kombu's connections that leaves an old primary."""

    @property
    def silence_s(self) -> float:
        """The longest silence; kombu reads only answers that come at once."""
        return super(FollowingConnection, self).silence_s or math.inf

    @property
    def renews(self) -> bool:  # type: ignore[override]  # a constant in the class above
        """Whether the connection is of a pool; kombu subclasses those that its event loop polls."""
        return "disconnect" not in vars(type(self))


@functools.cache
def leave_old_primaries() -> None:
    """Make connections of kombu and of Celery's result backend leave an old primary.

    A failover may leave the old primary alive, as a replica, and its connections open.  It then
    refuses each write, and redis-py keeps the connection (redis-py 8.1, kombu 5.7).  The network
    may also forget connections; then those that kombu polls are made anew as well.
    """
    from celery.backends.redis import RedisBackend
    from kombu.transport.redis import Channel, MultiChannelPoller, SentinelChannel

    for channel in (Channel, SentinelChannel):
        for name in ("connection_class", "connection_class_ssl"):
            setattr(channel, name, mixed(BrokerConnection, getattr(channel, name)))
    for client, command in (("client", "BRPOP"), ("subclient", "LISTEN")):
        name = f"_register_{command}"
        register = _renewing(getattr(MultiChannelPoller, name), client, command)
        setattr(MultiChannelPoller, name, register)
    setattr(Channel, "_create_client", _keeping(Channel._create_client))  # noqa: B010  (mypy)
    stock = RedisBackend._get_pool

    @functools.wraps(stock)
    def pool(backend: Any, **params: Any) -> Any:
        base = params.get("connection_class", redis.Connection)
        return stock(backend, **params | {"connection_class": mixed(FollowingConnection, base)})

    RedisBackend._get_pool = pool


def _keeping(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return kombu's function that makes a client, which keeps the one of a channel's pool.

    kombu makes one for each message that is sent, taken or acknowledged (kombu 5.7).  With redis-py
    8.1 that costs about a tenth of a small node's processor time.
    """

    @functools.wraps(stock)
    def create(channel: Any, asynchronous: bool = False) -> Any:
        if asynchronous:
            return stock(channel, asynchronous)
        kept = vars(channel).get("_kept_client")
        if kept is None or kept.connection_pool is not channel.pool:
            kept = channel._kept_client = stock(channel)
        return kept

    return create


def _renewing(stock: Callable[..., None], client: str, command: str) -> Callable[..., None]:
    """Return kombu's function that polls a connection, which first closes one that is stale."""

    @functools.wraps(stock)
    def register(poller: Any, channel: Any) -> None:
        holder = getattr(channel, client)
        poller._client_registered(channel, holder, command)  # takes a connection, if it has none
        if holder.connection.is_stale and not _may_answer(channel, command):
            held = poller._chan_to_sock.pop((channel, holder, command), None)
            if held is not None:
                poller._fd_to_chan.pop(held.fileno(), None)
                poller.poller.unregister(held)
            holder.connection.disconnect()
        stock(poller, channel)

    return register


def _may_answer(channel: Any, command: str) -> bool:
    """Whether a channel waits for a message that may be in its socket, or on its way."""
    from kombu.transport.redis import _socket_readable

    connection = channel._in_poll if command == "BRPOP" else None
    if not connection:
        return False
    waited_s = time.monotonic() - (channel._brpop_sent_at or 0.0)
    late = channel.brpop_timeout and waited_s > channel.brpop_timeout + LATE_S
    return not late or bool(_socket_readable(connection._sock))  # type: ignore[no-untyped-call]


# --- redbeat ----------------------------------------------------------------------------------


def redbeat(settings: Settings) -> dict[str, Any]:
    """Return the settings by which celery-redbeat finds the ledger's Redis.

    The password is not in the URL, because ``celery inspect conf`` shows the URL and hides the
    options.
    """
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
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    plain = parts._replace(netloc=f"{user}@{host}" if user else host).geturl()
    return plain, {"password": unquote(parts.password)}
