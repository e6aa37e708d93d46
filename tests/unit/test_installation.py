"""The additions of `install` to an app of Celery, in any order of configuration, and what it leaves
unchanged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.amqp import AMQP
from kombu import Exchange, Queue

from rlm_tasks import InvalidRequest, install
from rlm_tasks.conflicts import conflicts
from rlm_tasks.settings.model import Settings
from tests.integration.pages import PAGES, ROOT, read

SETTINGS = Settings(namespace="jobs")
OURS = ["jobs.critical", "jobs.high", "jobs.normal", "jobs.low"]
APP_SETTINGS = {
    "broker_url": "redis://nowhere/3",
    "result_backend": "redis://nowhere/4",
    "broker_transport_options": {"global_keyprefix": "shop:", "visibility_timeout": 60},
    "beat_schedule": {"stock": {"task": "stock", "schedule": 60.0}},
    "task_routes": {
        "*": {
            "queue": "else",
            "exchange": "else",
            "routing_key": "else",
            "serializer": "pickle",
            "priority": 9,
        }
    },
    "task_default_queue": "orders",
    "task_default_priority": 5,
    "worker_concurrency": 3,
}
MONITOR = {"task": "rlm.monitor", "schedule": 5.0}


def made(**config: Any) -> Celery:
    """Return a user's app, configured and installed into."""
    app = Celery("shop", set_as_current=False)
    app.config_from_object({**APP_SETTINGS, **config})
    return install(app, SETTINGS)


def stock() -> None:
    """A task of the user."""


def start_worker_or_beat(app: Celery) -> None:
    """Import the modules, as a worker and beat do first."""
    app.loader.import_default_modules()


# --- order of configuration -------------------------------------------------------------------


def after(app: Celery) -> None:
    app.config_from_object(APP_SETTINGS)
    install(app, SETTINGS)


def before(app: Celery) -> None:
    install(app, SETTINGS)
    app.config_from_object(APP_SETTINGS)


def forced(app: Celery) -> None:
    app.config_from_object(APP_SETTINGS, force=True)
    install(app, SETTINGS)


def twice(app: Celery) -> None:
    app.config_from_object(
        {
            "task_default_queue": "first",
            "beat_schedule": {"gone": {"task": "gone", "schedule": 1.0}},
        }
    )
    install(app, SETTINGS)
    assert "gone" in app.conf.beat_schedule
    assert "first" in app.amqp.queues
    vars(app).pop("amqp")  # Celery itself caches the queues that it has read
    app.config_from_object(APP_SETTINGS)


def by_attribute(app: Celery) -> None:
    for name, value in APP_SETTINGS.items():
        setattr(app.conf, name, value)
    install(app, SETTINGS)


def by_attribute_after(app: Celery) -> None:
    install(app, SETTINGS)
    for name, value in APP_SETTINGS.items():
        setattr(app.conf, name, value)


def by_attribute_after_it_was_read(app: Celery) -> None:
    install(app, SETTINGS)
    assert app.conf.timezone is None
    for name, value in APP_SETTINGS.items():
        setattr(app.conf, name, value)
    start_worker_or_beat(app)


def by_update(app: Celery) -> None:
    app.conf.update(APP_SETTINGS)
    install(app, SETTINGS)
    app.conf.update(task_default_queue="orders")


def by_update_after_it_was_read(app: Celery) -> None:
    assert app.conf.timezone is None
    install(app, SETTINGS)
    app.conf.update(APP_SETTINGS)
    start_worker_or_beat(app)


def with_a_second_call(app: Celery) -> None:
    install(app, SETTINGS)
    app.config_from_object(APP_SETTINGS)
    assert install(app) is app
    assert install(app, Settings(namespace="jobs")) is app


@pytest.mark.parametrize(
    "order",
    [
        after,
        before,
        forced,
        twice,
        by_attribute,
        by_attribute_after,
        by_attribute_after_it_was_read,
        by_update,
        by_update_after_it_was_read,
        with_a_second_call,
    ],
    ids=lambda order: order.__name__,
)
def test_the_order_of_install_and_configuration_does_not_matter(
    order: Callable[[Celery], None],
) -> None:
    app = Celery("shop", set_as_current=False)
    order(app)

    assert app.conf.beat_schedule == {**APP_SETTINGS["beat_schedule"], "rlm.monitor": MONITOR}
    assert app.conf.broker_transport_options == {
        **APP_SETTINGS["broker_transport_options"],
        "queue_order_strategy": "rlm_tasks.worker.queue_order:QueueOrder",
    }
    assert app.conf.worker_autoscaler == "rlm_tasks.worker.autoscaler:PressureAutoscaler"
    assert list(app.amqp.queues.consume_from) == ["orders", *OURS]
    assert {
        name: app.conf[name]
        for name in APP_SETTINGS
        if name not in ("beat_schedule", "broker_transport_options")
    } == {
        name: value
        for name, value in APP_SETTINGS.items()
        if name not in ("beat_schedule", "broker_transport_options")
    }
    assert {"rlm.node", "rlm.merge", "rlm.monitor"} <= {*app.tasks}
    assert APP_SETTINGS["beat_schedule"] == {"stock": {"task": "stock", "schedule": 60.0}}, (
        "the app's settings are copied, not changed"
    )


def test_installing_reads_no_configuration() -> None:
    app = install(Celery("shop", set_as_current=False), SETTINGS)

    assert not app.configured
    assert not app.finalized


def test_old_and_prefixed_names_of_settings_are_respected() -> None:
    app = Celery("django", set_as_current=False)
    app.config_from_object(
        {"CELERY_BEAT_SCHEDULE": APP_SETTINGS["beat_schedule"]}, namespace="CELERY"
    )
    install(app, SETTINGS)

    assert {*app.conf.beat_schedule} == {"stock", "rlm.monitor"}


def test_periodic_tasks_of_the_app_are_kept() -> None:
    app = Celery("shop", set_as_current=False)
    task = app.task(name="stock", shared=False)(stock)
    app.add_periodic_task(10.0, task.s(), name="before")
    install(app, SETTINGS)
    assert {*app.conf.beat_schedule} == {"before", "rlm.monitor"}
    app.add_periodic_task(10.0, task.s(), name="after")
    start_worker_or_beat(app)

    assert {*app.conf.beat_schedule} == {"before", "after", "rlm.monitor"}


# --- a second call ----------------------------------------------------------------------------


def test_a_second_call_changes_nothing() -> None:
    app = made()
    connected = _everything_about(app)
    install(app)
    install(app, SETTINGS)

    assert _everything_about(app) == connected


def _everything_about(app: Celery) -> Any:
    from celery import signals

    receivers = {
        name: len(getattr(signals, name).receivers)
        for name in ("worker_init", "worker_ready", "import_modules")
    }
    return (
        receivers,
        app.steps["worker"].copy(),
        app.conf.table(),
        {*app.tasks},
        app.amqp_cls,
        app.rlm_runtime,
    )


def test_a_second_call_with_other_settings_is_refused() -> None:
    app = made()

    with pytest.raises(
        InvalidRequest, match=r"settings=\['redis_url', .*, 'result_ttl_s'\]: the platform is"
    ) as error:
        install(
            app,
            Settings(namespace="jobs", redis_url="redis://:s3cret@elsewhere/0", result_ttl_s=99),
        )
    assert "s3cret" not in str(error.value)


# --- queues, routes and tasks -----------------------------------------------------------------


def test_queues_of_the_app_are_kept_and_can_be_selected() -> None:
    app = made(
        task_queues=[Queue("mail"), Queue("jobs.high", Exchange("mine"), routing_key="mine")]
    )
    assert list(app.amqp.queues.consume_from) == [
        "mail",
        "jobs.high",
        "jobs.critical",
        "jobs.normal",
        "jobs.low",
    ]
    assert app.amqp.queues["jobs.high"].exchange.name == "mine"
    app.amqp.queues.select("mail")
    assert [*app.amqp.queues.consume_from] == ["mail"]


def test_jobs_can_be_sent_without_automatic_creation_of_queues() -> None:
    app = made(
        task_create_missing_queues=False, task_default_exchange_type="topic", task_routes=None
    )

    routed = app.amqp.router.route({"queue": "jobs.low"}, "rlm.node")["queue"]
    assert (routed.name, routed.routing_key, routed.exchange.name) == (
        "jobs.low",
        "jobs.low",
        "jobs.low",
    )


def test_an_amqp_class_of_the_app_is_kept() -> None:
    class OwnAmqp(AMQP):
        argsrepr_maxsize = 7

    app = install(Celery("shop", set_as_current=False, amqp=OwnAmqp), SETTINGS)

    assert isinstance(app.amqp, OwnAmqp)
    assert app.amqp.argsrepr_maxsize == 7
    assert "jobs.low" in app.amqp.queues


@pytest.fixture
def in_memory() -> Iterator[Celery]:
    """A user's app on a broker in this process."""
    app = made(
        broker_url="memory://",
        broker_transport_options={},
        task_serializer="yaml",
        accept_content=["json", "yaml"],
    )
    yield app
    app.close()


@pytest.mark.parametrize("finalized", [False, True])
def test_a_route_for_all_tasks_does_not_change_the_queue_of_nodes(
    in_memory: Celery, finalized: bool
) -> None:
    if finalized:
        in_memory.finalize()
    in_memory.send_task("rlm.node", ["job", "root"], queue="jobs.low", ignore_result=True)

    with (
        in_memory.connection_for_read() as connection,
        connection.SimpleQueue(in_memory.amqp.queues["jobs.low"]) as queue,
    ):
        message = queue.get(timeout=5)
    assert (message.content_type, message.properties["priority"]) == ("application/json", 0)
    assert json.loads(message.body)[0] == ["job", "root"]
    assert in_memory.amqp.router.route({}, "stock")["queue"].name == "else", (
        "other tasks keep their route"
    )


def test_settings_for_all_tasks_do_not_change_our_tasks() -> None:
    app = Celery("shop", set_as_current=False, task_cls="tests.unit.test_installation:RetryingTask")
    app.conf.update(
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_acks_on_failure_or_timeout=False,
        task_ignore_result=False,
        task_retry_on_worker_lost=True,
        task_default_rate_limit="1/m",
        task_default_priority=5,
        task_serializer="pickle",
    )
    install(app, SETTINGS)

    for name in ("rlm.node", "rlm.merge"):
        task = app.tasks[name]
        assert (task.acks_late, task.reject_on_worker_lost, task.ignore_result) == (
            True,
            True,
            True,
        )
        assert (task.acks_on_failure, task.acks_on_timeout, task.retry_on_worker_lost) == (
            True,
            True,
            False,
        )
        assert (task.rate_limit, task.priority, task.serializer) == (0, 0, "json")
        assert not hasattr(task, "autoretry_for")
    assert conflicts(app) == ["result_backend is not Redis: " + NO_CHORDS]
    theirs = app.task(name="stock", shared=False)(stock)
    assert (theirs.acks_late, theirs.rate_limit, theirs.serializer) == (False, "1/m", "pickle")


class RetryingTask(Task):
    """A base class of the user."""

    autoretry_for = (Exception,)


# --- other settings of the app ----------------------------------------------------------------

NO_CHORDS = "partial answers are merged when a job ends, not while it runs; set a redis:// URL"


def test_an_autoscaler_and_a_monitor_schedule_of_the_app_are_kept() -> None:
    schedule = {"rlm.monitor": {"task": "rlm.monitor", "schedule": 60.0}}
    app = made(worker_autoscaler="shop.scaling:Theirs", beat_schedule=schedule)

    assert app.conf.worker_autoscaler == "shop.scaling:Theirs"
    assert app.conf.beat_schedule == schedule


def test_another_broker_gets_no_queue_order_of_redis() -> None:
    assert (
        made(broker_url="amqp://nowhere", broker_transport_options={}).conf.broker_transport_options
        == {}
    )


def test_a_worker_retries_channel_errors_unless_the_app_disables_it() -> None:
    assert made(broker_url="amqp://nowhere").conf.broker_channel_error_retry is True
    assert (
        made(
            broker_url="amqp://nowhere", broker_channel_error_retry=False
        ).conf.broker_channel_error_retry
        is False
    )


# --- the page ---------------------------------------------------------------------------------


def test_the_page_shows_the_files_of_the_example() -> None:
    name = "docs/existing_apps.md"
    files = {
        block.title: block.text
        for block in read(name, PAGES[name])
        if block.language == "python" and block.title
    }
    example = {
        each: (ROOT / "docs/examples/existing_app" / each).read_text(encoding="utf-8")
        for each in files
    }

    assert len(files) == 5
    assert [name for name, text in files.items() if not example[name].endswith(text)] == []


def test_two_apps_of_a_process_have_separate_tasks() -> None:
    one, other, without = made(), made(), Celery("without", set_as_current=False)

    assert one.tasks["rlm.node"].app is one
    assert other.tasks["rlm.node"].app is other
    assert "rlm.node" not in without.tasks


def test_a_program_that_starts_the_command_line_has_the_remote_commands() -> None:
    program = (
        "import sys; from celery import Celery; from rlm_tasks import install; "
        "install(Celery('shop', broker='memory://')).start(argv=sys.argv[1:])"
    )
    listed = subprocess.run(
        [sys.executable, "-c", program, "inspect", "--list"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "pressure" in listed.stdout
