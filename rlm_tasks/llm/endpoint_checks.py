"""Asks endpoints how they are: one worker of the platform at a time, in a thread of its main
process.

Decides who asks, how often, and what counts as an answer.  Refuses to know what becomes of an
endpoint that is ill (`health`).  Nothing is left open between two rounds, so pool processes that
are forked later share no connection."""

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
from rlm_tasks.llm.endpoint import Endpoint, ProviderDown, ProviderRefused
from rlm_tasks.llm.endpoint_health import Checkup, EndpointHealth, configured
from rlm_tasks.operations import registry
from rlm_tasks.settings.environment import key_of
from scheduler.events import ENDPOINT_ILL, ENDPOINT_WELL, Events

if TYPE_CHECKING:
    from rlm_tasks.engine.runtime import Runtime
    from rlm_tasks.settings.llm import EndpointSettings, LlmSettings

logger = logging.getLogger(__name__)

BACK_OFF_S = 1.0
"""A Redis that did not answer is asked again for the turn after this."""
STOP_S = 1.0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How one endpoint was when it was asked."""

    name: str
    latency_s: float  # 0: it did not answer
    why: str  # it is not well; '' when it is


async def ask(settings: LlmSettings) -> list[CheckResult]:
    """Return how all endpoints are, asked at once, by connections that are closed afterwards."""
    import openai  # noqa: F401  # before anything is timed: the first import takes half a second

    return await asyncio.gather(*(_ask(each, settings) for each in settings.endpoints_or_default))


async def _ask(place: EndpointSettings, settings: LlmSettings) -> CheckResult:
    limit_s = min(
        settings.health_timeout_s, settings.health_every_s
    )  # a round ends before the next one begins
    endpoint = Endpoint(
        place,
        SecretStr(key_of(place.key_env)),
        timeout_s=limit_s,
        per_host=1,
        idle_s=settings.idle_s,
    )
    began, why = time.monotonic(), ""
    try:
        await endpoint.check(limit_s)
    except RateLimited:
        pass  # that is its limit's news: it is there
    except CallTimeout:
        why = f"does not answer within {limit_s:g} s"
    except (ProviderDown, ProviderRefused) as error:
        # One that does not list its models has answered, and is there.
        listens = (
            isinstance(error, ProviderRefused)
            and error.category is Category.VALIDATION
            and error.status
        )
        why = "" if listens else error.why
    finally:
        await endpoint.close()
    return CheckResult(place.name, 0.0 if why else time.monotonic() - began, why)


def checks_of(runtime: Runtime) -> Checks | None:
    """Return what asks a worker's endpoints, before its pool forks; None for a worker that calls no
    models.
    """
    settings = runtime.settings.llm
    if not configured(settings) or all(
        registry.get(name).gate is None for name in registry.names()
    ):
        return None
    import openai  # noqa: F401  # now, for pool processes to share it: none may be forked while a thread imports it

    store = runtime.ledger.store
    return Checks(settings, store, Events(store, runtime.settings.alerts.history), runtime.worker)


class Checks(threading.Thread):
    """The thread of a worker that asks all endpoints each time it gets the turn."""

    def __init__(self, settings: LlmSettings, store: Store, events: Events, worker: str) -> None:
        super().__init__(name="rlm-endpoints", daemon=True)
        self._settings, self._store, self._events, self._worker = settings, store, events, worker
        self._health, self._key = (
            EndpointHealth(store, settings),
            Keys(store.namespace).endpoints_turn(),
        )
        self._stopping, self._away = threading.Event(), False
        self._asking: asyncio.Task[list[CheckResult]] | None = None

    def run(self) -> None:
        """Ask in turns with other workers, until stopped."""
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = BACK_OFF_S
            try:
                wait_s = self.look()
                self._away = False
            except StoreUnavailable as error:
                if not self._away:
                    logger.warning(
                        "Nobody knows how endpoints are until Redis answers; all get calls: %s",
                        error,
                    )
                self._away = True
            except asyncio.CancelledError:
                return
            except Exception:
                logger.exception("Endpoints could not be asked how they are, and are asked again")

    def stop(self) -> None:
        """End the thread, also in the middle of a round."""
        self._stopping.set()
        if self._asking is not None:
            with suppress(RuntimeError):  # its loop has just ended
                self._asking.get_loop().call_soon_threadsafe(self._asking.cancel)
        self.join(timeout=STOP_S)

    def look(self) -> float:
        """Ask all endpoints, if nobody else does; return in how many seconds to come back.  Raises
        StoreUnavailable.
        """
        if wait_s := self._turn_in_s():
            return wait_s
        before = {each.name: each for each in self._health.checkups()}
        for found in asyncio.run(self._round()):
            self._tell(found, before.get(found.name))
        return 0.0

    def _turn_in_s(self) -> float:
        """Take the turn for one interval, and return 0; or return when somebody may take it
        next.
        """
        interval_ms = max(1, int(1000 * self._settings.health_every_s))
        taken = self._store.call(
            lambda client: client.set(self._key, self._worker, nx=True, px=interval_ms)
        )
        return (
            0.0 if taken else max(1, self._store.call(lambda client: client.pttl(self._key))) / 1000
        )

    async def _round(self) -> list[CheckResult]:
        self._asking = asyncio.current_task()
        return await ask(self._settings)

    def _tell(self, found: CheckResult, before: Checkup | None) -> None:
        """Note how an endpoint was, and let people know when that has changed who gets calls."""
        now = self._health.tell(found.name, latency_s=found.latency_s, why=found.why)
        was_ill, is_ill = (
            before is not None and self._health.is_ill(before),
            self._health.is_ill(now),
        )
        if is_ill and not was_ill:
            message = f"endpoint {now.name} gets no calls, it failed {now.strikes} checks in a row: {now.why}"
            self._events.emit(ENDPOINT_ILL.event(message, {"endpoint": now.name, "why": now.why}))
        elif was_ill and not is_ill:
            message = f"endpoint {now.name} is well again, and gets calls"
            self._events.emit(ENDPOINT_WELL.event(message, {"endpoint": now.name}))
