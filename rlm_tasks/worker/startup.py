"""The start of a worker: it gets ready before its pool forks, or ends if a server is untrusted.

`installation` calls `prepare` when Celery reports that a worker begins.
"""

from __future__ import annotations

import gc
from typing import Any

from celery import Celery

from resilience.address import is_untrusted, tls
from resilience.errors import StoreUnavailable, StoreUntrusted
from resilience.store import masked
from rlm_tasks.engine import message_handlers as message_handlers  # shared by pool processes
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.messaging.broker import AWAY, with_connection
from rlm_tasks.messaging.queue_names import queue_names
from rlm_tasks.operations import registry
from rlm_tasks.worker import control as control  # its commands register themselves
from rlm_tasks.worker.bootsteps import drain_on_sigterm
from rlm_tasks.worker.upstream import (
    leave_promptly,
    leave_when_retiring,
    survive_reconnects_while_processes_are_recycled,
    survive_restarts_of_redis,
)


def prepare(worker: Any) -> None:
    """Import operations, build the runtime, and apply the patches of `upstream`, all once.

    Raises SystemExit with a message for operations that cannot be imported or untrusted servers.
    """
    app = worker.app
    try:
        registry.import_operations(app.rlm_settings.operations)
    except InvalidRequest as error:
        raise SystemExit(f"Error: {error}") from None
    _refuse_untrusted(app)
    runtime = app.rlm_runtime()
    runtime.worker = worker.hostname
    if serves_jobs(app) and not app.conf.value_set_for("worker_prefetch_multiplier"):
        worker.prefetch_multiplier = 1
    leave_promptly(lambda: runtime.page.draining)
    leave_when_retiring(lambda: runtime.retiring)
    survive_restarts_of_redis()
    survive_reconnects_while_processes_are_recycled()
    drain_on_sigterm(app)
    # Imported modules stay: pool processes share their memory, and an exit does not collect them.
    gc.freeze()


def serves_jobs(app: Celery) -> bool:
    """Whether a worker of this app consumes a queue of jobs."""
    return not {*queue_names(app.rlm_settings)}.isdisjoint(app.amqp.queues.consume_from)


def _refuse_untrusted(app: Celery) -> None:
    """Raise SystemExit when TLS to Redis or the broker fails: Celery would retry for ever."""
    url = masked(str(app.conf.broker_url))
    try:
        if tls(app.rlm_settings.redis_url):
            app.rlm_runtime().ledger.store.check()
        if app.conf.broker_use_ssl:
            with app.connection_for_read() as connection:
                with_connection(connection, lambda _: None)
    except StoreUntrusted as error:
        raise SystemExit(f"Error: {error}") from None
    except (StoreUnavailable, *AWAY) as error:
        if is_untrusted(error):
            advice = "see its certificate, and port and ssl_ca_certs in RLM_BROKER_URL"
            raise SystemExit(
                f"Error: the broker at {url} is not trusted ({error}); {advice}"
            ) from None
