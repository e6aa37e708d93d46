"""Addresses of Redis: the URLs that are accepted, their checks, and the clients made of them.

Stores and Celery's settings use it; begin with `Address`.  A URL may name a server, with or without
TLS, or sentinels, which name the current primary.
"""

from __future__ import annotations

import difflib
import functools
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from resilience.errors import InvalidValue

if TYPE_CHECKING:
    import redis
    from redis.sentinel import Sentinel

SOCKET, SENTINEL = "unix://", "sentinel://"
URLS = ("redis://", "rediss://", SOCKET, SENTINEL)
"""The beginnings of a URL of Redis."""
SECURE = ("rediss", "amqps")
REDIS_PORT, SENTINEL_PORT = 6379, 26_379
TLS_TIMEOUT_S = 1.0
"""A server that expects TLS answers its handshake within this time."""
SENTINEL_TIMEOUT_S = 1.0
"""A client asks the next sentinel if one does not answer within this time."""
VERIFICATION = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
_OF_POOL = ("max_connections", "timeout")
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OPTIONS = (*_FILES, "ssl_cert_reqs", "ssl_check_hostname")


HIDDEN = "***"
_IN_LOGIN = re.compile(r"(://(?:[^:@/?#]*:)?)[^@/?#]*@")
_IN_QUERY = re.compile(r"([?&]\w*password=).*", re.DOTALL)


def masked(url: str) -> str:
    """Return a URL, or a list of them, without its passwords, fit for messages and logs.

    Any text may be given.  A URL that cannot be read is shown as its scheme: any other part may
    belong to the password.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        is_host = re.fullmatch(r"[\w.-]+:\d{1,5}(/\d{0,3})?", url)
        return HIDDEN if re.search("[:@]", url) and not is_host else url
    if _unreadable(url):
        return f"{scheme}://{HIDDEN}" if scheme.isalnum() else HIDDEN
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_LOGIN.sub(rf"\1{HIDDEN}@", url))


@dataclass(frozen=True, slots=True)
class Address:
    """A URL of Redis.

    If it names sentinels, `master` is the name of the primary that they watch, and
    `sentinel_password` their own password.
    """

    url: str = field(repr=False)
    master: str = ""
    sentinel_password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Raise InvalidValue for a URL that cannot be used."""
        if not isinstance(self.url, str):
            raise InvalidValue("url", type(self.url).__name__, "must be a text")
        if why := _unreadable(self.url):
            raise InvalidValue("url", masked(self.url), why)
        if not self.url.startswith(URLS):
            raise InvalidValue("url", masked(self.url), f"must start with {', '.join(URLS)}")

    @property
    def is_watched(self) -> bool:
        """Whether the URL names sentinels."""
        return self.url.startswith(SENTINEL)

    def client(self, extra: type | None = None, **options: Any) -> redis.Redis:
        """Return a client with these options of redis-py; it connects at its first command.

        `extra` is mixed into the class of its connections.  Threads wait for a free connection
        when there are `max_connections`.  It follows a failover: each new connection asks the
        sentinels.
        """
        import redis

        if self.url.startswith(SOCKET):  # a socket knows neither option
            options = {
                name: value
                for name, value in options.items()
                if name not in ("socket_keepalive", "socket_connect_timeout")
            }
        connection = connection_class(self.url, extra)
        if not self.is_watched:
            pool = redis.BlockingConnectionPool.from_url(
                self.url, connection_class=connection, **options
            )
            return redis.Redis.from_pool(pool)
        shared = {name: options.pop(name) for name in _OF_POOL if name in options}
        return self.sentinels(**options).master_for(  # type: ignore[no-untyped-call,no-any-return]  # redis-py leaves it untyped
            self.master,
            connection_class=connection,
            connection_pool_class=_blocking_sentinel_pool(),
            **shared,
        )

    def misses_tls(self) -> str:
        """Return ``TLS`` when the port wants TLS and the URL has none, ``NOTLS`` the other way.

        Return '' when both agree, or the server does not answer.
        """
        if not self.url.startswith(("redis://", "rediss://")):
            return ""
        parts, secured = urlsplit(self.url), tls(self.url) is not None
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        place = parts.hostname or "localhost", parts.port or REDIS_PORT
        try:
            with socket.create_connection(place, TLS_TIMEOUT_S) as plain:
                if not secured:
                    context.wrap_socket(plain).close()
                    return "TLS"
                plain.sendall(b"PING\r\n")
                return "NOTLS" if plain.recv(1) in (b"+", b"-") else ""
        except OSError:
            return ""

    def sentinels(self, **options: Any) -> Sentinel:
        """Return a client of the sentinels, with a short timeout for each."""
        from redis.sentinel import Sentinel

        return Sentinel(  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            hosts(self.url),
            sentinel_kwargs=self.sentinel_options(
                options.get("socket_connect_timeout", SENTINEL_TIMEOUT_S)
            ),
            **credentials(self.url),
            **_encrypted(self.url),
            **options,
        )

    def sentinel_options(self, timeout_s: float = SENTINEL_TIMEOUT_S) -> dict[str, Any]:
        """Return the options of connections to the sentinels."""
        # With its default `retry`, redis-py would try a dead sentinel for seconds before the next.
        patience = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": None}
        password = {"password": self.sentinel_password} if self.sentinel_password else {}
        return {**patience, **password, **_encrypted(self.url)}


@functools.cache
def _blocking_sentinel_pool() -> Any:
    """Return redis-py's pool of sentinels, whose threads wait for a free connection."""
    from redis import BlockingConnectionPool
    from redis.sentinel import SentinelConnectionPool

    return type("BlockingSentinelPool", (SentinelConnectionPool, BlockingConnectionPool), {})


def connection_class(url: str, extra: type | None) -> Any:
    """Return redis-py's class of connections to a URL, with the class `extra` mixed in."""
    import redis
    from redis.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

    if url.startswith(SOCKET):
        base: Any = redis.UnixDomainSocketConnection
    elif url.startswith(SENTINEL):
        base = SentinelManagedSSLConnection if tls(url) is not None else SentinelManagedConnection
    else:
        base = redis.SSLConnection if tls(url) is not None else redis.Connection
    return base if extra is None else mixed(extra, base)


@functools.cache
def mixed(extra: type, base: type) -> type:
    """Return a subclass of a class of connections in which a method of `extra` comes first."""
    return type(f"{extra.__name__}Of{base.__name__}", (extra, base), {})


# --- the parts of a URL -----------------------------------------------------------------------


def _parts(url: str) -> list[SplitResult]:
    """Return the parts of each URL in a list that is written as in Celery, with ``;``."""
    return [urlsplit(each) for each in url.split(";")] if url.count("://") > 1 else [urlsplit(url)]


def hosts(url: str) -> list[tuple[str, int]]:
    """Return host and port of each sentinel."""
    return [(part.hostname or "localhost", part.port or SENTINEL_PORT) for part in _parts(url)]


def credentials(url: str) -> dict[str, Any]:
    """Return database, user name and password from the first URL of a list of sentinels."""
    first = _parts(url)[0]
    named = {"username": first.username, "password": first.password}
    return {
        "db": int(first.path.strip("/") or 0),
        **{name: unquote(value) for name, value in named.items() if value},
    }


def tls(url: str) -> dict[str, Any] | None:
    """Return redis-py's options of TLS, or None for a connection without TLS.

    The verification is one of `ssl`'s constants.  Certificates are verified unless the URL says
    otherwise.
    """
    first = _parts(url)[0]
    options = {name: value for name, value in parse_qsl(first.query) if name.startswith("ssl_")}
    if first.scheme not in SECURE and not options:
        return None
    verification = VERIFICATION[options.pop("ssl_cert_reqs", "required")]
    by_name = options.pop("ssl_check_hostname", "true").lower() != "false"
    return {
        "ssl_cert_reqs": verification,
        "ssl_check_hostname": by_name and verification != ssl.CERT_NONE,
        **options,
    }


def _encrypted(url: str) -> dict[str, Any]:
    return {} if (options := tls(url)) is None else {"ssl": True, **options}


def without_tls_options(url: str) -> str:
    """Return a URL, or a list of them, without the options of TLS."""

    def plain(part: SplitResult) -> str:
        kept = [
            (name, value)
            for name, value in parse_qsl(part.query, keep_blank_values=True)
            if not name.startswith("ssl_")
        ]
        return part._replace(query=urlencode(kept)).geturl()

    return ";".join(map(plain, _parts(url))) if "ssl_" in url else url


def is_untrusted(error: BaseException) -> bool:
    """Whether a connection failed because of TLS: by the server's certificate or by the client's.

    A server that closed the connection may have other reasons, so this does not count.
    """
    cause = error.__cause__ or error.__context__ or error
    return isinstance(cause, ssl.SSLError) and not isinstance(
        cause, ssl.SSLEOFError | ssl.SSLZeroReturnError
    )


# --- the check of a URL -----------------------------------------------------------------------


def check(url: str) -> None:
    """Raise ValueError for a URL that cannot be used, with the form to write instead.

    The error contains no part of a password.
    """
    is_watched = url.startswith(SENTINEL)
    if why := _unreadable(url):
        raise ValueError(why)
    first, *others = _parts(url)
    names = [host for host, _ in hosts(url)] if is_watched else []
    if is_watched and ("," in "".join(names) or {each.scheme for each in others} - {first.scheme}):
        raise ValueError(
            "write each sentinel as Celery does: "
            "sentinel://:PASSWORD@HOST1:26379/0;sentinel://HOST2:26379"
        )
    for name, value in parse_qsl(first.query):
        if name.startswith("ssl_"):
            _check_option(first.scheme, name, value)
    if not all(_repeats(first, each, is_watched) for each in others):
        raise ValueError(
            "the values of the first host hold for all hosts: leave them out for the others"
        )


def _unreadable(url: str) -> str:
    """Return why a URL cannot be read, '' if it can; no part of the URL is in the words.

    A character of a password that is not percent-encoded ends the password early, or the host.
    """
    if any(each.isspace() or not each.isprintable() for each in url):
        why = "it contains a blank"
    elif "#" in url:
        why = "it contains #"
    elif any(map(_has_stray_at, url.split(";"))):
        why = "it contains @ more than once, or behind / or ?"
    elif not _has_numbers(url):
        why = "a port and a database are numbers"
    else:
        return ""
    return f"cannot be read: {why}, and special characters of a password are percent-encoded"


def _has_stray_at(address: str) -> bool:
    before, _, query = address.partition("?")
    behind_host = before.partition("://")[2].partition("/")[2]
    options = [each for each in query.split("&") if query]
    return (
        address.count("@") > 1
        or "@" in behind_host + query
        or not all("=" in each for each in options)
    )


def _has_numbers(url: str) -> bool:
    """Whether the ports of a URL, and the database of a URL of Redis, are numbers."""
    try:
        first, *others = _parts(url)
        ports = [part.port for part in (first, *others)]
    except ValueError:
        return False
    options = dict(parse_qsl(first.query, keep_blank_values=True))
    path = "" if url.startswith(SOCKET) else first.path.strip("/")
    databases = [path or "0", options.get("db", "0")] if url.startswith(URLS) else []
    return 0 not in ports and all(each.isascii() and each.isdecimal() for each in databases)


def _repeats(first: SplitResult, other: SplitResult, is_watched: bool) -> bool:
    """Whether a further host has no parts that differ from the first host's.

    Each RabbitMQ may have its own user, password and virtual host.
    """
    parts = [(each.path.strip("/"), each.username, each.password) for each in (first, other)]
    return other.query in ("", first.query) and (
        not is_watched or all(b in ("", None, a) for a, b in zip(*parts, strict=True))
    )


def _check_option(scheme: str, name: str, value: str) -> None:
    if name not in _OPTIONS:
        near = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0)
        raise ValueError(f"{name} is no option of TLS here; did you mean {near[0]}?")
    if scheme not in (*SECURE, "sentinel"):
        raise ValueError(f"{name} is an option of TLS; use it with rediss:// or amqps://")
    if name == "ssl_cert_reqs" and value not in VERIFICATION:
        raise ValueError(f"ssl_cert_reqs={value!r}: must be {_either(tuple(VERIFICATION))}")
    if name in _FILES and not Path(value).is_file():
        raise ValueError(f"{name}: there is no file {value}")


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
