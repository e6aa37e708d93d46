"""Install the platform in a Celery app: a user's app, or our own.

`rlm_tasks.install` is the `install` of this module.  It adds tasks, queues, a schedule and worker
steps, which stay when the app is configured before or after it.  The user's own settings are kept,
even if they hinder jobs (see `conflicts`).  Begin with `install`.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from celery import Celery, signals
from celery._state import _get_active_apps
from celery.app.amqp import AMQP, Queues
from kombu.utils.imports import symbol_by_name

from rlm_tasks.conflicts import conflicts
from rlm_tasks.engine import tasks
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.messaging.broker_kinds import broker_kind
from rlm_tasks.messaging.queue_names import queue_names
from rlm_tasks.messaging.transports import QUEUE_ORDER
from rlm_tasks.settings.environment import settings as environment
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry.logs import install_logs
from rlm_tasks.telemetry.tracing import install_tracing

if TYPE_CHECKING:
    from rlm_tasks.engine.runtime import Runtime

logger = logging.getLogger(__name__)

AUTOSCALER = "rlm_tasks.worker.autoscaler:PressureAutoscaler"
CONTROL = "rlm_tasks.worker.control:pressure"
FLOWER = "rlm_tasks.flower:install"
STEPS = (
    "rlm_tasks.worker.bootsteps:SupervisorStep",
    "rlm_tasks.worker.bootsteps:HealthStep",
)
"""They are loaded by name, because clients do not need them."""
EX_USAGE = 2


class WorkerOption(click.Option):
    """A worker option.  Celery's own class would import its whole command line into clients."""

    help_group = "RLM Options"


_METRICS_PORT = WorkerOption(
    ("--metrics-port",),
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="Port of /metrics, /livez, /readyz and /health; 0: none. Also CELERY_WORKER_METRICS_PORT.",
)


def install(app: Celery, settings: Settings | None = None) -> Celery:
    """Add the platform to a Celery app, and return the app.

    It adds tasks, queues, a schedule and worker steps, before or after the app is configured.  The
    app's own settings stay; `conflicts` lists those that hinder jobs.  A second call changes
    nothing.  `settings` are by default those of the environment.  Raises InvalidRequest when an
    environment variable cannot be used, and when the platform was installed in the app with other
    settings.
    """
    if not isinstance(app, Celery):
        raise InvalidRequest("app", app, "must be a Celery app")
    if not isinstance(settings, Settings | None):
        raise InvalidRequest("settings", settings, "must be Settings(...), or left out")
    if installed := getattr(app, "rlm_settings", None):
        if settings not in (None, installed):
            differing = [
                name
                for name in Settings.model_fields
                if getattr(settings, name) != getattr(installed, name)
            ]
            raise InvalidRequest(
                "settings",
                differing,
                "the platform is installed in this app with other values of them; "
                "install it only once",
            )
        return app
    settings = settings or _settings_of_process()

    @functools.cache
    def runtime() -> Runtime:
        from rlm_tasks.engine.runtime import Runtime

        return Runtime.of(app, settings)

    app.rlm_runtime = runtime
    app.rlm_settings = settings
    tasks.register(app, runtime)
    app.steps["worker"] |= {*STEPS}
    app.user_options["worker"].add(_METRICS_PORT)
    _add_queues(app)
    _complete_when_configured(app)
    signals.worker_init.connect(_prepare, weak=False)  # once for any number of apps
    signals.worker_ready.connect(_on_ready, weak=False)
    install_tracing(app, settings)
    install_logs(app, settings)
    _load_for_command(app)
    return app


def installed_apps() -> list[Celery]:
    """Return the open apps of this process that the platform is installed in, by name."""
    return sorted(
        (each for each in _get_active_apps() if hasattr(each, "rlm_settings")),
        key=lambda each: str(each.main),
    )


def command_of(app: Celery) -> str:
    """Return the beginning of Celery's commands for an app: ``celery -A shop``.

    The name is that of the command line, else the shortest module that holds the app, else the
    app's own.
    """
    context = click.get_current_context(silent=True)
    named = context.find_root().params.get("app") if context is not None else None
    return f"celery -A {named if isinstance(named, str) else _module_of(app)}"


def _module_of(app: Celery) -> str:
    names = [
        name.removesuffix(".celery")
        for name, module in list(sys.modules.items())
        if name != "__main__"
        and any(getattr(module, "__dict__", {}).get(each) is app for each in ("app", "celery"))
    ]
    return min(names, key=lambda name: (len(name), name), default=str(app.main or "your_app"))


def _settings_of_process() -> Settings:
    """Return the settings of the environment.

    In a celery command an invalid variable ends the process with one line, because Celery would
    print a traceback.
    """
    try:
        return environment()
    except InvalidRequest as error:
        context = click.get_current_context(silent=True)
        if context is None or context.find_root().command.name != "celery":
            raise
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(EX_USAGE) from None


# --- queues, routes and configuration ---------------------------------------------------------


class PlatformAMQP(AMQP):  # type: ignore[misc]  # Celery ships no types
    """An app's own queues and routes, with those of jobs added.

    They are not added to ``task_queues``, because a worker of an app that sets it no longer
    consumes its default queue.
    """

    def Queues(self, *args: Any, **options: Any) -> Queues:  # noqa: N802  # Celery's name
        """Declare the queues of jobs as Celery declares missing queues.

        A worker without ``-Q`` consumes them.
        """
        queues = super().Queues(*args, **options)
        for name in queue_names(self.app.rlm_settings):
            if name not in queues:
                queues.select_add(queues.new_missing(name))
        return queues

    def flush_routes(self) -> None:
        """Put our route first, so that an app's route for all tasks does not move messages of jobs.

        The message of a job has its own queue.
        """
        super().flush_routes()
        self._rtable: list[Any] = [_route, *self._rtable]


def _route(name: str, *_: Any, **__: Any) -> dict[str, Any] | None:
    # A client may send before its app is finalized, when the attributes of tasks do not count yet.
    if name not in tasks.OURS:
        return None
    return {"serializer": tasks.JobTask.serializer, "priority": tasks.JobTask.priority}


def _add_queues(app: Celery) -> None:
    own = symbol_by_name(app.amqp_cls)  # type: ignore[no-untyped-call]  # kombu is partly typed
    app.amqp_cls = PlatformAMQP if own is AMQP else type(own.__name__, (PlatformAMQP, own), {})
    vars(app).pop("amqp", None)  # it is made again at its next use


def _complete_when_configured(app: Celery) -> None:
    """Complete the configuration after each load, and again at the start of a worker or beat.

    In between, ``app.conf.beat_schedule = ...`` may have replaced the added entry.
    """

    def complete(**_: Any) -> None:
        _complete(app)

    app.on_after_configure.connect(complete, weak=False)
    signals.import_modules.connect(complete, sender=app, weak=False)
    if app.configured:
        _complete(app)


def _complete(app: Celery) -> None:
    """Set the configuration keys that the app does not set itself."""
    conf = app.conf
    if tasks.MONITOR_TASK not in (conf.beat_schedule or {}):
        conf.beat_schedule = {**(conf.beat_schedule or {}), **monitoring(app.rlm_settings)}
    options = conf.broker_transport_options or {}
    if broker_kind(conf.broker_url).orders_queues and "queue_order_strategy" not in options:
        conf.broker_transport_options = {**options, "queue_order_strategy": QUEUE_ORDER}
    if not conf.value_set_for("broker_channel_error_retry"):
        # Else the worker ends when an item runs longer than RabbitMQ waits for an acknowledgement.
        conf.broker_channel_error_retry = True
    if not conf.value_set_for("worker_autoscaler"):
        conf.worker_autoscaler = AUTOSCALER


def monitoring(settings: Settings) -> dict[str, Any]:
    """Return the entry of beat's schedule that starts the monitor."""
    return {
        tasks.MONITOR_TASK: {"task": tasks.MONITOR_TASK, "schedule": settings.pressure.monitor_s}
    }


# --- in a worker and in celery's commands -----------------------------------------------------


def _prepare(sender: Any, **_: Any) -> None:
    """Prepare a worker before its pool forks."""
    if hasattr(sender.app, "rlm_settings"):
        from rlm_tasks.worker.startup import prepare

        prepare(sender)


def _on_ready(sender: Any, **_: Any) -> None:
    """Warn of settings that hinder jobs, start to offer slots, and touch the ready file."""
    app = sender.app
    if not hasattr(app, "rlm_settings"):
        return
    from rlm_tasks.worker.startup import serves_jobs

    for conflict in conflicts(app) if serves_jobs(app) else ():
        logger.warning("%s", conflict)
    if (supervisor := getattr(app, "rlm_supervisor", None)) is not None:
        supervisor.begin()
    if app.rlm_settings.ready_file:
        Path(app.rlm_settings.ready_file).touch()


def _load_for_command(app: Celery) -> None:
    """Load remote control commands for inspect and control, and the tabs for flower."""
    command = _command()
    if command in ("inspect", "control"):
        symbol_by_name(CONTROL)  # type: ignore[no-untyped-call]  # kombu is partly typed
    elif command == "flower":
        symbol_by_name(FLOWER)(app)  # type: ignore[no-untyped-call]  # kombu is partly typed


def _command() -> str:
    """Return the name of the celery command that this process runs, '' for none.

    A program that calls `app.start` installs before the command line is read.
    """
    context = click.get_current_context(silent=True)
    if context is not None:
        return context.find_root().invoked_subcommand or ""
    return next((each for each in sys.argv[1:] if each in ("inspect", "control", "flower")), "")
