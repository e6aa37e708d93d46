"""The start of a worker: it gets ready before its pool forks, or ends with one sentence.

It ends if a server is untrusted, and if its pool cannot run jobs.

`installation` calls `prepare` when Celery reports that a worker begins.
"""

from __future__ import annotations

import gc
from typing import Any

import click
from celery import Celery

from resilience.address import is_untrusted
from resilience.errors import StoreUnavailable
from resilience.store import masked
from rlm_tasks.engine import message_handlers as message_handlers  # shared by pool processes
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.messaging.broker import AWAY, with_connection
from rlm_tasks.messaging.queue_names import queue_names
from rlm_tasks.operations import registry
from rlm_tasks.worker import control as control  # its commands register themselves
from rlm_tasks.worker.bootsteps import drain_on_sigterm
from rlm_tasks.worker.dead_letters import DeadLetters
from rlm_tasks.worker.pools import wrong_pool
from rlm_tasks.worker.upstream import (
    keep_what_is_no_message,
    leave_chords_to_the_root_merge,
    leave_promptly,
    leave_when_retiring,
    survive_reconnects_while_processes_are_recycled,
    survive_refusals_of_redis,
    survive_restarts_of_redis,
)

EX_USAGE = 2


def prepare(worker: Any) -> None:
    """Import operations, build the runtime, and apply the patches of `upstream`, all once.

    Raises SystemExit with a message for a pool that runs no jobs, operations that cannot be
    imported, and untrusted servers.
    """
    app = worker.app
    if serves_jobs(app) and (wrong := wrong_pool(worker)):
        own = app.conf.task_default_queue
        click.echo(
            f"Error: {wrong}: jobs run in the pools prefork, with start method fork, and solo; set "
            f"one of them, or start this worker for other queues only, as in -Q {own}",
            err=True,
        )
        raise SystemExit(EX_USAGE)
    try:
        registry.import_operations(app.rlm_settings.operations)
    except InvalidRequest as error:
        raise SystemExit(f"Error: {error}") from None
    _refuse_unusable(app)
    runtime = app.rlm_runtime()
    runtime.worker = worker.hostname
    if serves_jobs(app) and not app.conf.value_set_for("worker_prefetch_multiplier"):
        worker.prefetch_multiplier = 1
    leave_promptly(lambda: runtime.page.draining)
    leave_when_retiring(lambda: runtime.retiring)
    _keep_what_is_no_message(app)
    survive_restarts_of_redis()
    survive_refusals_of_redis()
    leave_chords_to_the_root_merge()
    survive_reconnects_while_processes_are_recycled()
    drain_on_sigterm(app)
    # Imported modules stay: pool processes share their memory, and an exit does not collect them.
    gc.freeze()


def _keep_what_is_no_message(app: Celery) -> None:
    ledger, ours = app.rlm_runtime().ledger, frozenset(queue_names(app.rlm_settings))
    letters = DeadLetters(ledger.store, ledger.keys.dead)
    keep_what_is_no_message(letters.keep, ours.__contains__)


def serves_jobs(app: Celery) -> bool:
    """Whether a worker of this app consumes a queue of jobs."""
    return not {*queue_names(app.rlm_settings)}.isdisjoint(app.amqp.queues.consume_from)


def _refuse_unusable(app: Celery) -> None:
    """Raise SystemExit when Redis or the broker can never be used: Celery would retry for ever.

    TLS fails, the password is wrong, or the server is a node of a cluster.
    """
    url = masked(str(app.conf.broker_url))
    try:
        app.rlm_runtime().ledger.store.check()
        if app.conf.broker_use_ssl:
            with app.connection_for_read() as connection:
                with_connection(connection, lambda _: None)
    except (StoreUnavailable, *AWAY) as error:
        if isinstance(error, StoreUnavailable) and not error.retryable:
            raise SystemExit(f"Error: {error}") from None
        if is_untrusted(error):
            advice = "see its certificate, and port and ssl_ca_certs in RLM_BROKER_URL"
            raise SystemExit(
                f"Error: the broker at {url} is not trusted ({error}); {advice}"
            ) from None
