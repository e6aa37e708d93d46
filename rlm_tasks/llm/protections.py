"""The guards of calls to models, declared in each process that has an endpoint.

`registry.import_operations` imports this module by name, also without the `openai` client: so each
client shows the limits and breakers of models.
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
