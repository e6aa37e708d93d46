"""How much memory a pool process that calls models may take beyond what it began with.

Decides when its caches are cleared, and when it is to be replaced.  Refuses to know how a process
ends.  Source document 3 gives such figures for components of one program each; a process that has
Celery and the client of models in it holds more than that before its first call, so here they bound
what it has grown by."""

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
    """What one process has grown by since its first node that calls models.

    An agent of source document 3 (section 1.1) warns at 120 MB and is critical at 140 MB: the
    defaults of the settings."""

    def __init__(self, settings: LlmSettings, held: Callable[[], float]) -> None:
        """`held` returns how many MB the process holds."""
        self._settings, self._held, self._began_mb = settings, held, held()
        self._cleared_at_mb = 0.0

    def look(self, runtime: Runtime) -> None:
        """Clear caches, once for each new height, and have the process replaced where that does not
        help.
        """
        its, grown_mb = self._settings, self._held() - self._began_mb
        if grown_mb < max(its.memory_warn_mb, self._cleared_at_mb):
            return
        if not self._cleared_at_mb:
            logger.warning(
                "This process has grown by %.0f MB since it first called a model; its caches are cleared",
                grown_mb,
            )
        runtime.items.forget()
        gc.collect()
        self._cleared_at_mb = grown_mb = self._held() - self._began_mb
        if grown_mb >= its.memory_critical_mb and not runtime.retiring:
            logger.warning(
                "This process has grown by %.0f MB since it first called a model; it is to be replaced",
                grown_mb,
            )
            runtime.retiring = True


def watched(guards: ProcessGuards) -> Growth:
    """Return the growth of this process, looked at after each of its nodes from now on."""
    growth = Growth(guards.settings.llm, lambda: held_mb(os.getpid()))

    def look(task: Any, **_: Any) -> None:
        growth.look(task.app.rlm_runtime())

    signals.task_postrun.connect(look, weak=False)
    return growth
