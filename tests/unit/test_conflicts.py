"""Settings of an app that conflict with jobs."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from rlm_tasks import install
from rlm_tasks.celery import app as own_app
from rlm_tasks.conflicts import conflicts
from rlm_tasks.settings.model import Settings
from rlm_tasks.settings.sections import NodeSettings
from tests.unit.test_installation import made, stock


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"worker_prefetch_multiplier": 4}, "worker_prefetch_multiplier=4: nodes wait"),
        ({"task_always_eager": True}, "task_always_eager=True: jobs never run"),
        (
            {"worker_deduplicate_successful_tasks": True},
            "worker_deduplicate_successful_tasks=True: ",
        ),
        ({"worker_enable_remote_control": False}, "worker_enable_remote_control=False: "),
        ({"result_backend": "rpc://"}, "result_backend is not Redis: "),
        ({"task_time_limit": 3}, "task_time_limit=3: shorter than a node may run (4 s)"),
        ({"task_soft_time_limit": 4}, "task_soft_time_limit=4: shorter than"),
        (
            {"broker_transport_options": {"queue_order_strategy": "sorted"}},
            "queue_order_strategy='sorted': priorities",
        ),
        (
            {"task_annotations": {"rlm.node": {"acks_late": False}}},
            "task_annotations acks_late=False for rlm.node: ",
        ),
    ],
)
def test_a_conflicting_setting_is_kept_and_reported(config: dict[str, Any], said: str) -> None:
    app = made(**config)

    (sentence,) = conflicts(app)
    assert said in sentence
    assert {name: app.conf[name] for name in config} == config, "the app's setting is unchanged"


def test_annotations_of_all_tasks_do_not_reach_those_of_jobs() -> None:
    everything = {"rate_limit": "1/m", "time_limit": 1, "acks_late": False, "ignore_result": False}
    app = made(task_annotations=({"*": everything}, {"rlm.merge": {"time_limit": 7}}))

    node, merge = app.tasks["rlm.node"], app.tasks["rlm.merge"]
    assert (node.rate_limit, node.time_limit, node.acks_late) == (0, None, True)
    assert (merge.rate_limit, merge.time_limit, merge.acks_late) == (0, 7, True)
    assert app.task(name="own", shared=False)(stock).rate_limit == "1/m"
    assert conflicts(app) == []


def test_harmless_settings_are_not_reported() -> None:
    assert (
        conflicts(
            made(
                worker_prefetch_multiplier=1,
                task_time_limit=60,
                task_annotations={"stock": {"rate_limit": 1}},
            )
        )
        == []
    )
    assert conflicts(own_app) == []
    app = install(
        Celery("shop", set_as_current=False), Settings(node=NodeSettings(target_ms=10_000))
    )
    app.conf.update(result_backend="redis://nowhere/0", task_time_limit=30)

    assert "shorter than a node may run (40 s)" in conflicts(app)[0]
