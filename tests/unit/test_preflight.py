"""Settings that lose data are named, with what to do."""

from __future__ import annotations

from typing import Any, cast

import pytest
import redis
from redis.exceptions import ResponseError

from resilience.store import Store
from rlm_tasks.celery import configuration
from rlm_tasks.preflight import dangers
from rlm_tasks.settings import NodeSettings, Settings


class Server:
    """Answers as a server with these settings does."""

    def __init__(self, *, policy: str = "noeviction", aof: int = 1, save: str | None = "", tells: bool = True) -> None:
        self._info = {"maxmemory_policy": policy, "aof_enabled": aof}
        self._save, self._tells = save, tells

    def info(self) -> dict[str, Any]:
        if not self._tells:
            raise ResponseError("NOPERM this user has no permissions to run the 'info' command")
        return self._info

    def config_get(self, name: str) -> dict[str, str]:
        if self._save is None:
            raise ResponseError("unknown command CONFIG")
        return {name: self._save}


def found(server: Server, settings: Settings | None = None, **celery: Any) -> list[str]:
    """Return what is said of a server."""
    settings = settings or Settings()
    store = Store("redis://user:secret@host/0", client=cast(redis.Redis, server))
    return dangers(store, settings, {**configuration(settings), **celery})


def test_a_server_that_keeps_its_data_is_not_mentioned() -> None:
    assert found(Server()) == []
    assert found(Server(aof=0, save="3600 1")) == []
    assert found(Server(aof=0, save=None)) == [], "a managed server that does not tell is trusted"
    assert found(Server(policy="allkeys-lru", tells=False)) == []


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (
            Server(policy="allkeys-lru"),
            "evicts keys (maxmemory-policy allkeys-lru): jobs may vanish. Set maxmemory-policy noeviction",
        ),
        (Server(policy="volatile-ttl"), "maxmemory-policy volatile-ttl"),
        (Server(aof=0), "keeps nothing on disk: a restart loses every job. Set appendonly yes"),
    ],
)
def test_what_would_lose_jobs_is_said_with_what_to_do(server: Server, said: str) -> None:
    [danger] = found(server)

    assert said in danger
    assert "secret" not in danger


def test_a_visibility_timeout_shorter_than_a_node_is_said() -> None:
    settings = Settings(node=NodeSettings(item_limit_s=600))

    assert found(Server(), settings) == []
    [danger] = found(Server(), settings, broker_transport_options={"visibility_timeout": 300})
    assert "visibility_timeout=300 s is shorter than a node may run (600 s)" in danger
    [danger] = found(Server(), task_time_limit=7200, broker_transport_options={})
    assert "visibility_timeout=3600 s" in danger
    assert found(Server(), broker_url="amqp://host", broker_transport_options={"visibility_timeout": 1}) == []
