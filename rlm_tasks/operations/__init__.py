"""Operations, the functions that jobs apply to items, with their guards and their context.

Users declare operations with `operation`; the engine calls them.  Begin with `registry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlm_tasks.lazy import lazy

if TYPE_CHECKING:
    from rlm_tasks.operations.context import Context as Context
    from rlm_tasks.operations.registry import Operation as Operation
    from rlm_tasks.operations.registry import get as get
    from rlm_tasks.operations.registry import import_operations as import_operations
    from rlm_tasks.operations.registry import names as names
    from rlm_tasks.operations.registry import operation as operation
    from rlm_tasks.operations.registry import register as register

_HOMES = {
    "rlm_tasks.operations.context": "Context",
    "rlm_tasks.operations.registry": "Operation get import_operations names operation register",
}
__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
