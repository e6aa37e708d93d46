"""URLs of Redis: their forms, their mistakes, and the clients made from them.

No error shows any part of a password.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis.connection import SSLConnection
from redis.sentinel import SentinelConnectionPool

from resilience.address import (
    SENTINEL_TIMEOUT_S,
    Address,
    check,
    credentials,
    hosts,
    is_untrusted,
    masked,
    tls,
    without_tls_options,
)
from resilience.errors import InvalidValue
from resilience.store import Store
from rlm_tasks.settings.document import export_config, to_dict, validate
from rlm_tasks.settings.model import Settings

WATCHED = "sentinel://me:s3%40cret@one:26380/2;sentinel://two"
SECURE = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}


@pytest.fixture
def authority(tmp_path: Path) -> str:
    """A file that exists; it is read only when a client connects."""
    (tmp_path / "ca.pem").touch()
    return str(tmp_path / "ca.pem")


# --- the parts of a URL -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://host", None),
        ("unix:///tmp/redis.sock", None),
        ("sentinel://host", None),
        ("rediss://host", SECURE),
        ("amqps://host", SECURE),
        (
            "rediss://host?ssl_cert_reqs=required&ssl_ca_certs=/ca",
            {**SECURE, "ssl_ca_certs": "/ca"},
        ),
        ("rediss://host?ssl_check_hostname=false", {**SECURE, "ssl_check_hostname": False}),
        (
            "rediss://host?ssl_cert_reqs=none",
            {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False},
        ),
        ("sentinel://one/0?ssl_ca_certs=/ca;sentinel://two", {**SECURE, "ssl_ca_certs": "/ca"}),
    ],
)
def test_certificates_are_verified_unless_the_url_says_otherwise(
    url: str, options: dict[str, Any] | None
) -> None:
    assert tls(url) == options


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("rediss://:p%40w@host/1?ssl_ca_certs=/ca&db=3", "rediss://:p%40w@host/1?db=3"),
        (
            "amqps://a/v?ssl_cert_reqs=none;amqps://b/v?ssl_cert_reqs=none",
            "amqps://a/v;amqps://b/v",
        ),
        ("redis://:a;b@host/0", "redis://:a;b@host/0"),
    ],
)
def test_tls_options_can_be_removed_from_a_url(url: str, plain: str) -> None:
    assert without_tls_options(url) == plain


def test_a_list_of_sentinels_has_one_password_and_one_database() -> None:
    assert hosts(WATCHED) == [("one", 26380), ("two", 26379)]
    assert credentials(WATCHED) == {"username": "me", "password": "s3@cret", "db": 2}


def test_a_client_uses_one_password_for_the_sentinels_and_one_for_the_primary() -> None:
    pool = Address(WATCHED, "primary", "theirs").client(socket_timeout=5.0).connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "primary"
    assert pool.connection_kwargs["password"] == "s3@cret"
    assert pool.connection_kwargs["db"] == 2

    [one, two] = [each.connection_pool for each in pool.sentinel_manager.sentinels]
    assert (one.connection_kwargs["host"], two.connection_kwargs["host"]) == ("one", "two")
    assert {each.connection_kwargs["password"] for each in (one, two)} == {"theirs"}
    assert one.connection_kwargs["socket_timeout"] == SENTINEL_TIMEOUT_S, (
        "the next sentinel can be asked soon"
    )


def test_a_unix_socket_gets_no_tcp_options() -> None:
    pool = (
        Address("unix:///run/redis.sock?db=3")
        .client(socket_keepalive=True, socket_connect_timeout=1.0)
        .connection_pool
    )

    assert pool.make_connection().path == "/run/redis.sock"


def test_tls_options_hold_for_the_sentinels_and_for_the_primary() -> None:
    pool = (
        Address("sentinel://one/0?ssl_ca_certs=/ca;sentinel://two", "primary")
        .client()
        .connection_pool
    )
    sentinels = [each.connection_pool for each in pool.sentinel_manager.sentinels]

    for each in (pool, *sentinels):
        assert issubclass(each.connection_class, SSLConnection)
        assert each.connection_kwargs["ssl_ca_certs"] == "/ca"


def test_a_certificate_error_is_distinguished_from_a_closed_connection() -> None:
    def failed(cause: Exception) -> Exception:
        error = ConnectionError("Error 1 connecting")
        error.__context__ = cause
        return error

    assert is_untrusted(failed(ssl.SSLCertVerificationError("self-signed certificate")))
    assert is_untrusted(ssl.SSLError("wrong version number"))
    assert not is_untrusted(failed(ssl.SSLEOFError("EOF occurred in violation of protocol")))
    assert not is_untrusted(failed(ConnectionRefusedError()))


# --- mistakes in a URL ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        (
            "sentinel://one,two/0",
            (
                "write each sentinel as Celery does: "
                "sentinel://:PASSWORD@HOST1:26379/0;sentinel://HOST2:26379"
            ),
        ),
        ("sentinel://one;redis://two", "write each sentinel as Celery does"),
        ("sentinel://:hush@one:x/0", "cannot be read: a port and a database are numbers"),
        (
            "sentinel://one/0;sentinel://two?ssl_ca_certs=/ca",
            "the values of the first host hold for all hosts",
        ),
        ("sentinel://one/0;sentinel://two/1", "the values of the first host hold for all hosts"),
        (
            "sentinel://:a@one/0;sentinel://:hush@two/0",
            "the values of the first host hold for all hosts",
        ),
        (
            "amqps://one;amqps://two?ssl_cert_reqs=none",
            "the values of the first host hold for all hosts",
        ),
        ("sentinel://:hush@one/main", "cannot be read: a port and a database are numbers"),
        (
            "rediss://:hush@host?ssl_cert_req=none",
            "ssl_cert_req is no option of TLS here; did you mean ssl_cert_reqs?",
        ),
        (
            "rediss://:hush@host?ssl_cert_reqs=CERT_NONE",
            "ssl_cert_reqs='CERT_NONE': must be required, optional or none",
        ),
        (
            "redis://:hush@host?ssl_cert_reqs=none",
            "ssl_cert_reqs is an option of TLS; use it with rediss:// or amqps://",
        ),
        (
            "amqp://me:hush@host?ssl_cert_reqs=none",
            "ssl_cert_reqs is an option of TLS; use it with rediss:// or amqps://",
        ),
        (
            "rediss://:hush@host?ssl_ca_certs=/nowhere/ca.pem",
            "ssl_ca_certs: there is no file /nowhere/ca.pem",
        ),
    ],
)
def test_a_wrong_url_is_refused_with_advice(url: str, advice: str) -> None:
    with pytest.raises(ValueError, match="^" + advice.replace("?", r"\?")) as raised:
        check(url)
    assert "hush" not in str(raised.value)


def test_valid_urls_are_accepted(authority: str) -> None:
    for url in (
        "redis://host",
        "unix:///tmp/s",
        WATCHED,
        f"rediss://host/0?ssl_ca_certs={authority}",
        "amqp://host//",
        "",
    ):
        check(url)
    for url in ("sentinel://:a@one/1;sentinel://:a@two/1", "amqps://a:b@one/v;amqps://c:d@two/w"):
        check(url)


@pytest.mark.parametrize(
    ("environment", "issue"),
    [
        (
            {"RLM_REDIS_URL": "sentinel://host"},
            (
                "RLM_SENTINEL_MASTER='': give the name that the sentinels watch the primary by, "
                "as in `sentinel monitor NAME ...`"
            ),
        ),
        (
            {"RLM_BROKER_URL": "sentinel://:hush@host"},
            (
                "RLM_BROKER_URL='sentinel://:***@host': set RLM_SENTINEL_MASTER to the name under "
                "which the sentinels watch the primary"
            ),
        ),
        (
            {"RLM_RESULT_BACKEND": "rediss://:hush@host?ssl_password=hush"},
            (
                "RLM_RESULT_BACKEND='rediss://:***@host?ssl_password=***': ssl_password is no "
                "option of TLS here; did you mean "
            ),
        ),
    ],
)
def test_settings_with_an_incomplete_address_are_refused(
    environment: dict[str, str], issue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    [problem] = validate(environment)

    assert problem.startswith(issue)
    assert "hush" not in problem


def test_passwords_of_sentinels_are_never_shown_or_exported() -> None:
    own = Settings(
        redis_url="sentinel://:hush@host", sentinel_master="primary", sentinel_password="hush"
    )

    assert to_dict(own)["sentinel_password"] == "***"
    assert (
        "hush"
        not in str(to_dict(own)) + export_config(own) + repr(own.address) + Store(own.address).url
    )


SPECIAL = " #?@/:;%&=[]{}'\"\t\n|<>^`~!$*(),+"
FORMS = (
    "redis://:{}@host:6379/0",
    "rediss://user:{}@host",
    "redis://:{}@host/x",
    "redis://:{}@host:port/0",
    "sentinel://:{}@one:1/0;sentinel://two",
    "unix:///run/redis.sock?db=0&password={}",
    "amqp://user:{}@host/vhost",
    ":{}@host/0",
    "redis:/{}",
    "redis:{}@host",
)


def test_no_message_about_a_url_contains_a_part_of_its_password() -> None:
    random = Random(1)
    accepted = 0
    for _ in range(3000):
        words = [f"secret{random.randrange(10**6)}" for _ in range(random.randint(1, 4))]
        strays = "".join(random.choices(SPECIAL, k=random.choice((0, 0, 1, 2))))
        url = random.choice(FORMS).format(strays.join(words))
        told = [masked(url)]
        try:
            check(url)
            accepted += 1
        except ValueError as error:
            told.append(str(error))
        try:
            told.append(Store(url).url)
        except InvalidValue as error:
            told += [str(error), repr(error)]

        assert [text for text in told if "secret" in text] == [], url
    assert accepted > 300


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://:hush now@host/0", "a blank"),
        ("redis://:hu#sh@host/0", "#"),
        ("redis://:hu?sh@host/0", "@ more than once, or behind"),
        ("redis://:1/hush@host/0", "@ more than once, or behind"),
        ("redis://:hu@sh@host/0", "@ more than once, or behind"),
        ("redis://host/x", "a port and a database are numbers"),
        ("redis://host:hush/0", "a port and a database are numbers"),
        ("redis://host/0?db=x", "a port and a database are numbers"),
        ("amqp://me:hush@host:x/", "a port and a database are numbers"),
    ],
)
def test_a_url_with_an_unencoded_character_is_refused_at_once(url: str, why: str) -> None:
    with pytest.raises(ValueError, match="cannot be read: .*" + re.escape(why)):
        check(url)
    with pytest.raises(InvalidValue, match=re.escape(why)):
        Store(url)


def test_a_url_that_can_be_read_keeps_all_but_its_password() -> None:
    assert masked("redis://me:a;b@host:1/2") == "redis://me:***@host:1/2"
    assert (
        masked("sentinel://one:1/2;sentinel://:a@two") == "sentinel://one:1/2;sentinel://:***@two"
    )
    assert masked("unix:///run/redis.sock?password=a") == "unix:///run/redis.sock?password=***"
    assert masked("filesystem://") == "filesystem://"
    assert masked("text") == "text"
