"""The beat-scheduled monitor: beat asks, all workers hear it, and the first of them looks.

Decides where the monitor runs: in a thread of a worker's main process.  A message in a queue would wait behind the very
overload it is to report; a broadcast does not, and one that nobody hears does not pile up.  Refuses to know what is seen.
"""

from __future__ import annotations

import logging
import threading

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from resilience.breaker import CircuitBreakers
from resilience.errors import StoreUnavailable
from rlm_tasks.queues import QueueGauge
from rlm_tasks.runtime import Runtime
from scheduler.alerts import Alerts, Webhook
from scheduler.events import Events
from scheduler.monitor import Monitor, MonitorSettings

logger = logging.getLogger(__name__)


class MonitorThread(threading.Thread):
    """Waits in a worker's main process to be asked."""

    def __init__(self, monitor: Monitor, alerts: Alerts) -> None:
        super().__init__(name="rlm-monitor", daemon=True)
        self._monitor, self._alerts = monitor, alerts
        self._asked, self._stopping = threading.Event(), False

    def ask(self) -> None:
        """Have a look, unless another worker does."""
        self._asked.set()

    def run(self) -> None:
        """Look each time somebody asks, until stopped."""
        while self._asked.wait() and not self._stopping:
            self._asked.clear()
            try:
                self._monitor.look()
            except (KombuError, RedisError, OSError, StoreUnavailable) as error:
                logger.warning("The cluster's level is not known, hosts act on their own: %s", error)
            except Exception:
                logger.exception("The monitor met something unexpected, and looks again when asked")

    def stop(self) -> None:
        """End the thread; alerts that wait are delivered first."""
        self._stopping = True
        self._asked.set()
        self.join(timeout=5)
        self._alerts.close()


def monitor_thread(app: Celery, runtime: Runtime) -> MonitorThread:
    """Build the monitor of one worker."""
    settings, store = runtime.settings, runtime.ledger.store
    events = Events(store, settings.alerts.history)
    alerts = Alerts(store, settings.alerts, events)
    advised = settings.autoscale.webhook_url
    monitor = Monitor(
        runtime.board, store, MonitorSettings(settings.pressure, settings.admission, settings.autoscale, settings.alerts),
        usage=runtime.usage, breakers=CircuitBreakers(store), gauge=QueueGauge(app).read, events=events, alerts=alerts,
        room=runtime.room, wake=runtime.wake,
        webhook=Webhook(advised, settings.alerts.webhook_secret) if advised else None, worker=runtime.worker,
    )  # fmt: skip
    return MonitorThread(monitor, alerts)
