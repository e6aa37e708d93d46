"""Health checks of endpoints, made by one worker of the platform at a time.

They run in a thread of the worker's main process.  A boot step starts `checks_of`;
`rlm endpoints --check` calls `check_all`.  The results go to `endpoint_health`.  No connection
stays open between two rounds, so pool processes that are forked later share none.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import SecretStr

from resilience.errors import CallTimeout, Category, RateLimited, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks.llm.endpoint import Endpoint
from rlm_tasks.llm.endpoint_health import Checkup, EndpointHealth, configured
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, without_words
from rlm_tasks.operations import registry
from rlm_tasks.settings.environment import key_of
from scheduler.events import ENDPOINT_ILL, ENDPOINT_WELL, Events

if TYPE_CHECKING:
    from rlm_tasks.engine.runtime import Runtime
    from rlm_tasks.settings.llm import EndpointSettings, LlmSettings

logger = logging.getLogger(__name__)

BACK_OFF_S = 1.0
"""Seconds until the next try after Redis did not answer."""
STOP_S = 1.0
"""Most seconds that `stop` waits for the thread."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check of an endpoint."""

    name: str
    latency_s: float  # 0: it did not answer
    why: str  # the cause of a failure, or what it says of the key; '' if it passed
    failed: bool = False  # no connection, a timeout, or a status of 500 and above


async def check_all(settings: LlmSettings) -> list[CheckResult]:
    """Check all endpoints with a `health_path` at once, by connections of their own."""
    import openai  # noqa: F401  # the first import takes half a second, which no check must count

    checked = [each for each in settings.endpoints_or_default if each.health_path]
    return await asyncio.gather(*(_check(each, settings) for each in checked))


async def _check(about: EndpointSettings, settings: LlmSettings) -> CheckResult:
    # A round must end before the next one begins.
    limit_s = min(settings.health_timeout_s, settings.health_every_s)
    endpoint = Endpoint(
        about,
        SecretStr(key_of(about.key_env)),
        timeout_s=limit_s,
        per_host=1,
        idle_s=settings.idle_s,
    )
    began, why, failed = time.monotonic(), "", False
    try:
        await endpoint.check(limit_s)
    except RateLimited:
        pass  # a full limit is no failure: the endpoint answers
    except CallTimeout:
        why, failed = f"does not answer within {limit_s:g} s", True
    except ProviderDown as error:
        why, failed = without_words(error), True
    except ProviderRefused as error:
        failed = not error.status and error.category is Category.VALIDATION  # nothing was sent
        # It answers, though not for this path or this key; calls may have other rights.
        is_told = failed or error.category is not Category.VALIDATION
        why = without_words(error) if is_told else ""
    finally:
        await endpoint.close()
    return CheckResult(about.name, 0.0 if failed else time.monotonic() - began, why, failed)


def checks_of(runtime: Runtime) -> Checks | None:
    """Return the thread of checks for a worker, before its pool forks.

    None for a worker that calls no models.
    """
    settings = runtime.settings.llm
    if not configured(settings) or all(
        registry.get(name).gate is None for name in registry.names()
    ):
        return None
    # Imported before the fork, so that pool processes share it and no thread imports it later.
    import openai  # noqa: F401

    store = runtime.ledger.store
    return Checks(settings, store, Events(store, runtime.settings.alerts.history), runtime.worker)


class Checks(threading.Thread):
    """The thread of a worker that checks all endpoints each time it gets the turn."""

    def __init__(self, settings: LlmSettings, store: Store, events: Events, worker: str) -> None:
        super().__init__(name="rlm-endpoints", daemon=True)
        self._settings, self._store, self._events, self._worker = settings, store, events, worker
        self._health, self._key = (
            EndpointHealth(store, settings),
            Keys(store.namespace).endpoints()[2],
        )
        self._stopping, self._away = threading.Event(), False
        self._task: asyncio.Task[list[CheckResult]] | None = None

    def run(self) -> None:
        """Check in turns with other workers, until stopped."""
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = BACK_OFF_S
            try:
                wait_s = self.check_in_turn()
                self._away = False
            except StoreUnavailable as error:
                if not self._away:
                    logger.warning(
                        "Endpoints are not checked until Redis answers; all get calls: %s", error
                    )
                self._away = True
            except asyncio.CancelledError:
                return
            except Exception:
                logger.exception("The check of endpoints failed; it is tried again")

    def stop(self) -> None:
        """End the thread, also in the middle of a round."""
        self._stopping.set()
        if self._task is not None:
            with suppress(RuntimeError):  # its loop has just ended
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        self.join(timeout=STOP_S)

    def check_in_turn(self) -> float:
        """Check all endpoints, unless another worker has the turn; return the seconds to wait.

        Raises StoreUnavailable.
        """
        if wait_s := self._turn_in_s():
            return wait_s
        before = {each.name: each for each in self._health.checkups()}
        for result in asyncio.run(self._round()):
            self._record(result, before.get(result.name))
        return 0.0

    def _turn_in_s(self) -> float:
        """Take the turn for one interval and return 0, or the seconds until it may be taken."""
        interval_ms = max(1, int(1000 * self._settings.health_every_s))
        taken = self._store.call(
            lambda client: client.set(self._key, self._worker, nx=True, px=interval_ms)
        )
        return (
            0.0 if taken else max(1, self._store.call(lambda client: client.pttl(self._key))) / 1000
        )

    async def _round(self) -> list[CheckResult]:
        self._task = asyncio.current_task()
        return await check_all(self._settings)

    def _record(self, result: CheckResult, before: Checkup | None) -> None:
        """Store a result, and emit an event if the endpoint now gets calls, or no calls."""
        now = self._health.record(
            result.name, latency_s=result.latency_s, why=result.why, failed=result.failed
        )
        was_unhealthy = before is not None and self._health.is_unhealthy(before)
        is_unhealthy = self._health.is_unhealthy(now)
        if is_unhealthy and not was_unhealthy:
            message = (
                f"endpoint {now.name} gets no calls, it failed {now.strikes} checks in a row: "
                f"{now.why}"
            )
            self._events.emit(ENDPOINT_ILL.event(message, {"endpoint": now.name, "why": now.why}))
        elif was_unhealthy and not is_unhealthy:
            message = f"endpoint {now.name} is healthy again, and gets calls"
            self._events.emit(ENDPOINT_WELL.event(message, {"endpoint": now.name}))
