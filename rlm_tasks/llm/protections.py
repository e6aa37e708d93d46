"""Declare what protects calls to models, in every process that knows an endpoint.

`import_operations` imports it by name, also where the `openai` client is not installed: a client
without it still shows the limits and breakers of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlm_tasks.llm.endpoint_health import configured
from rlm_tasks.operations import registry

if TYPE_CHECKING:
    from rlm_tasks.operations.protection import Protection
    from rlm_tasks.settings.model import Settings


def of_models(settings: Settings) -> Iterator[Protection]:
    """Yield the breaker of each endpoint, and the limits of each model and key."""
    if configured(settings.llm):
        from rlm_tasks.llm.endpoint_pool import protections

        yield from protections(settings.llm)


registry.declare_protections(of_models)
