"""Put the platform into a Celery app: its owner's, or our own.

`rlm_tasks.install` is this `install`.  It adds tasks, queues, a schedule and worker steps so that
they stay, whatever is configured before or after.  Settings of the app's owner hold, also where
they stand in the way of jobs (see `conflicts`).
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from celery import Celery, signals
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
"""Loaded by name: clients need none of them."""
EX_USAGE = 2


class WorkerOption(click.Option):
    """An option of ours; Celery's own class would import its whole command line into clients."""

    help_group = "RLM Options"


_METRICS_PORT = WorkerOption(
    ("--metrics-port",),
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="Port of /metrics, /livez, /readyz and /health; 0: none. Also CELERY_WORKER_METRICS_PORT.",
)


def install(app: Celery, settings: Settings | None = None) -> Celery:
    """Add the platform to a Celery app, and return it: its tasks, queues, schedule and worker
    steps.

    Before or after the app is configured.  Whatever its owner has set stays, `conflicts` names what
    stands in the way; a second call changes nothing.  Settings are those of the environment unless
    given.  Raises InvalidRequest when a variable cannot be used, and when the app has been
    installed into with other settings."""
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
                "the app was installed into with other values of these; install it once",
            )
        return app
    wanted = settings or _settings_of_process()

    @functools.cache
    def runtime() -> Runtime:
        from rlm_tasks.engine.runtime import Runtime

        return Runtime.of(app, wanted)

    app.rlm_runtime = runtime
    app.rlm_settings = wanted
    tasks.register(app, runtime)
    app.steps["worker"] |= {*STEPS}
    app.user_options["worker"].add(_METRICS_PORT)
    _add_queues(app)
    _complete_when_configured(app)
    signals.worker_init.connect(_prepare, weak=False)  # once, however many apps there are
    signals.worker_ready.connect(_say_ready, weak=False)
    install_tracing(app, wanted)
    install_logs(app, wanted)
    _serve_command(app)
    return app


def _settings_of_process() -> Settings:
    """Read the environment; a mistake in it ends a celery command with a sentence, for Celery would
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


# --- what is added ----------------------------------------------------------------------------


class PlatformAMQP(AMQP):  # type: ignore[misc]  # Celery ships no types
    """An app's own queues and routes, and ours beside them.

    Not in ``task_queues``: a worker of an app that sets them would no longer consume its default
    queue."""

    def Queues(self, *args: Any, **options: Any) -> Queues:  # noqa: N802  # Celery's name
        """Declare the queues of jobs as Celery declares those that are missing, and consume them
        without ``-Q``.
        """
        queues = super().Queues(*args, **options)
        for name in queue_names(self.app.rlm_settings):
            if name not in queues:
                queues.select_add(queues.new_missing(name))
        return queues

    def flush_routes(self) -> None:
        """Ask ours first: a message of a job says itself where it goes, whatever a route for all
        tasks says.
        """
        super().flush_routes()
        self._rtable: list[Any] = [_route, *self._rtable]


def _route(name: str, *_: Any, **__: Any) -> dict[str, Any] | None:
    # A client may send before its app is finalized: what the class of the tasks says is not known
    # then.
    return (
        {"serializer": tasks.Doorbell.serializer, "priority": tasks.Doorbell.priority}
        if name in tasks.OURS
        else None
    )


def _add_queues(app: Celery) -> None:
    theirs = symbol_by_name(app.amqp_cls)  # type: ignore[no-untyped-call]  # kombu is partly typed
    app.amqp_cls = (
        PlatformAMQP if theirs is AMQP else type(theirs.__name__, (PlatformAMQP, theirs), {})
    )
    vars(app).pop("amqp", None)  # made anew when it is next used


def _complete_when_configured(app: Celery) -> None:
    """Complete the configuration each time it is loaded, and once more at the start of a worker or
    a beat.

    In between, ``app.conf.beat_schedule = ...`` may have replaced what was added.
    """

    def complete(**_: Any) -> None:
        _complete(app)

    app.on_after_configure.connect(complete, weak=False)
    signals.import_modules.connect(complete, sender=app, weak=False)
    if app.configured:
        _complete(app)


def _complete(app: Celery) -> None:
    """Add what the app's owner leaves open."""
    conf = app.conf
    if tasks.MONITOR_TASK not in (conf.beat_schedule or {}):
        conf.beat_schedule = {**(conf.beat_schedule or {}), **monitoring(app.rlm_settings)}
    options = conf.broker_transport_options or {}
    if broker_kind(conf.broker_url).orders_queues and "queue_order_strategy" not in options:
        conf.broker_transport_options = {**options, "queue_order_strategy": QUEUE_ORDER}
    if not conf.value_set_for("broker_channel_error_retry"):
        # An item that runs for longer than RabbitMQ waits for its message would end the worker.
        conf.broker_channel_error_retry = True
    if not conf.value_set_for("worker_autoscaler"):
        conf.worker_autoscaler = AUTOSCALER


def monitoring(settings: Settings) -> dict[str, Any]:
    """Return the entry of beat's schedule by which the cluster's level is worked out."""
    return {
        tasks.MONITOR_TASK: {"task": tasks.MONITOR_TASK, "schedule": settings.pressure.monitor_s}
    }


# --- what happens in a worker, and in a celery command ----------------------------------------


def _prepare(sender: Any, **_: Any) -> None:
    """Make a worker ready before its pool forks."""
    if hasattr(sender.app, "rlm_settings"):
        from rlm_tasks.worker.startup import prepare

        prepare(sender)


def _say_ready(sender: Any, **_: Any) -> None:
    """Warn of settings that stand in the way of jobs, and offer slots."""
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


def _serve_command(app: Celery) -> None:
    """Load what one celery command needs: remote control commands, or the tabs of Flower."""
    command = _command()
    if command in ("inspect", "control"):
        symbol_by_name(CONTROL)  # type: ignore[no-untyped-call]  # kombu is partly typed
    elif command == "flower":
        symbol_by_name(FLOWER)(app)  # type: ignore[no-untyped-call]  # kombu is partly typed


def _command() -> str:
    """Return the celery command that this process runs, '' when it runs none."""
    context = click.get_current_context(silent=True)
    return (context.find_root().invoked_subcommand or "") if context is not None else ""
