"""Checks at the start of a worker: settings that lose data, with advice."""

from __future__ import annotations

from typing import Any, cast

import pytest
import redis
from redis.exceptions import ResponseError

from resilience.store import Store
from rlm_tasks.celery import configuration
from rlm_tasks.settings.model import Settings
from rlm_tasks.settings.sections import NodeSettings
from rlm_tasks.worker.preflight import of_celery, of_redis, of_urls, warnings


class Server:
    """A server that answers with these settings."""

    def __init__(
        self,
        *,
        policy: str = "noeviction",
        aof: int = 1,
        save: str | None = "",
        shows_info: bool = True,
        **more: Any,
    ) -> None:
        self._info = {"maxmemory_policy": policy, "aof_enabled": aof, **more}
        self._save, self._shows_info = save, shows_info

    def info(self) -> dict[str, Any]:
        if not self._shows_info:
            raise ResponseError("NOPERM this user has no permissions to run the 'info' command")
        return self._info

    def config_get(self, name: str) -> dict[str, str]:
        if self._save is None:
            raise ResponseError("unknown command CONFIG")
        return {name: self._save}


def found(server: Server, settings: Settings | None = None, **celery: Any) -> list[str]:
    """Return the findings on a server."""
    settings = settings or Settings()
    store = Store("redis://user:secret@host/0", client=cast(redis.Redis, server))
    return warnings(store, settings, {**configuration(settings), **celery})


def test_a_server_that_keeps_its_data_has_no_finding() -> None:
    assert found(Server()) == []
    assert found(Server(aof=0, save="3600 1")) == []
    assert found(Server(aof=0, save=None)) == [], (
        "a managed server that hides its settings is trusted"
    )
    assert found(Server(policy="allkeys-lru", shows_info=False)) == []


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (
            Server(policy="allkeys-lru"),
            (
                "evicts keys (maxmemory-policy allkeys-lru): jobs may vanish. Set "
                "maxmemory-policy noeviction"
            ),
        ),
        (Server(policy="volatile-ttl"), "maxmemory-policy volatile-ttl"),
        (Server(aof=0), "keeps nothing on disk: a restart loses every job. Set appendonly yes"),
        (Server(aof_last_write_status="err"), "could not write to its disk at its last attempt"),
        (
            Server(redis_version="6.0.9"),
            "lacks commands of Redis 6.2, which the platform sends. Install Redis 7.2",
        ),
        (
            Server(redis_version="6.2.14"),
            "is older than the versions that redis-py is tested with. Install Redis 7.2",
        ),
        (
            Server(redis_version="8.0.1", role="slave"),
            "is a replica: it takes no writes. Set RLM_REDIS_URL to its primary",
        ),
        (Server(redis_version="8.0.1", redis_mode="cluster"), "is one node of a cluster"),
        (
            Server(used_memory=80 * 2**20, maxmemory=100 * 2**20),
            "80 of 100 MB are used (80 %). Raise maxmemory",
        ),
    ],
)
def test_settings_that_would_lose_jobs_are_reported_with_advice(server: Server, said: str) -> None:
    [danger] = found(server)

    assert said in danger
    assert "secret" not in danger


def test_each_check_has_a_state_and_only_problems_have_advice() -> None:
    def states(server: Server) -> dict[str, str]:
        store = Store("redis://host/0", client=cast(redis.Redis, server))
        looked_at = list(of_redis(store, Settings()))
        assert all((each.state == "ok") == (not each.advice) for each in looked_at)
        return {each.check: each.state for each in looked_at}

    well = {"redis": "ok", "eviction": "ok", "persistence": "ok", "memory": "ok"}
    assert states(Server(redis_version="7.2.4", used_memory=74, maxmemory=100)) == well
    assert states(Server(redis_version="10.0.0", used_memory=10**9)) == well, (
        "without a limit there is nothing to exceed"
    )
    assert states(Server(redis_version="6.2.0"))["redis"] == "warning"
    assert states(Server(redis_version="5.0.7"))["redis"] == "fault"
    assert states(Server(used_memory=75, maxmemory=100))["memory"] == "warning"
    assert states(Server(used_memory=95, maxmemory=100))["memory"] == "fault"
    assert states(Server(shows_info=False)) == {"redis": "ok"}


@pytest.mark.parametrize(
    ("celery", "said"),
    [
        ({"accept_content": ["json", "pickle"]}, "also takes pickle"),
        (
            {"worker_cancel_long_running_tasks_on_connection_loss": True},
            "running nodes are ended and repeated",
        ),
    ],
)
def test_settings_of_celery_that_harm_nodes_are_reported(celery: dict[str, Any], said: str) -> None:
    [danger] = found(Server(), **celery)

    assert said in danger


def test_an_app_that_does_not_accept_json_is_a_fault() -> None:
    wrong = of_celery(Settings(), {**configuration(Settings()), "accept_content": ["yaml"]})

    assert [each.state for each in wrong] == ["fault", "warning"]
    assert "refuses nodes, which are JSON" in wrong[0].found


def test_a_visibility_timeout_shorter_than_a_node_is_reported() -> None:
    settings = Settings(node=NodeSettings(item_limit_s=600))

    assert found(Server(), settings) == []
    [danger] = found(Server(), settings, broker_transport_options={"visibility_timeout": 300})
    assert "visibility_timeout=300 s is shorter than a node may run (600 s)" in danger
    [danger] = found(Server(), task_time_limit=7200, broker_transport_options={})
    assert "visibility_timeout=3600 s" in danger
    assert (
        found(
            Server(), broker_url="amqp://host", broker_transport_options={"visibility_timeout": 1}
        )
        == []
    )


def test_tls_without_verification_is_reported_for_each_url() -> None:
    careless = Settings(
        redis_url="rediss://:secret@host?ssl_cert_reqs=none",
        broker_url="amqps://host//?ssl_cert_reqs=none",
    )

    [finding] = of_urls(careless)
    assert finding.state == "warning"
    assert finding.found.startswith("RLM_REDIS_URL, RLM_BROKER_URL: TLS without verification")
    [danger] = found(Server(), careless)
    assert danger.endswith(
        "Remove ssl_cert_reqs=none, and set ssl_ca_certs to the file of the authority"
    ), "a worker logs it at its start"


def test_tls_with_verification_is_ok_and_a_url_without_tls_has_no_finding() -> None:
    [finding] = of_urls(Settings(redis_url="rediss://host", broker_url="amqp://host//"))

    assert (finding.check, finding.state) == ("tls", "ok")
    assert finding.found == "RLM_REDIS_URL: encrypted, and certificates are verified"
    assert list(of_urls(Settings(redis_url="redis://host"))) == []
