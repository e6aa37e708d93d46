"""A limit on the memory by which a pool process grows after its first call to a model.

A gate starts the watch of its process.  At one size the caches are cleared, at a greater one the
process is replaced after its node.  The limits count growth only: Celery and the client of models
alone may hold more than that.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals

from scheduler.sampling import held_mb

if TYPE_CHECKING:
    from rlm_tasks.engine.guards import ProcessGuards
    from rlm_tasks.engine.runtime import Runtime
    from rlm_tasks.settings.llm import LlmSettings

logger = logging.getLogger(__name__)


class Growth:
    """The growth of one process since its first node that calls models.

    By default caches are cleared at 120 MB, and the process is replaced at 140 MB.
    """

    def __init__(self, settings: LlmSettings, held: Callable[[], float]) -> None:
        """`held` returns how many MB the process holds."""
        self._settings, self._held, self._began_mb = settings, held, held()
        self._cleared_at_mb = 0.0

    def check(self, runtime: Runtime) -> None:
        """Clear the caches at each new maximum; if that is not enough, replace the process."""
        settings, grown_mb = self._settings, self._held() - self._began_mb
        if grown_mb < max(settings.memory_warn_mb, self._cleared_at_mb):
            return
        if not self._cleared_at_mb:
            logger.warning(
                "This process has grown by %.0f MB since its first call to a model; its caches are "
                "cleared",
                grown_mb,
            )
        runtime.items.forget()
        gc.collect()
        self._cleared_at_mb = grown_mb = self._held() - self._began_mb
        if grown_mb >= settings.memory_critical_mb and not runtime.retiring:
            logger.warning(
                "This process has grown by %.0f MB since its first call to a model; it will be "
                "replaced",
                grown_mb,
            )
            runtime.retiring = True


def watch(guards: ProcessGuards) -> Growth:
    """Return the growth of this process, which is checked after each of its nodes from now on."""
    growth = Growth(guards.settings.llm, lambda: held_mb(os.getpid()))

    def check(task: Any, **_: Any) -> None:
        growth.check(task.app.rlm_runtime())

    signals.task_postrun.connect(check, weak=False)
    return growth
