"""All settings with defaults and units, and the only module that reads the environment.

Every folder above reads `Settings`; `Client` and `install` make them.  Begin with `model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlm_tasks.lazy import lazy

if TYPE_CHECKING:
    from rlm_tasks.settings.environment import key_of as key_of
    from rlm_tasks.settings.environment import settings as settings
    from rlm_tasks.settings.environment import traces_exporters as traces_exporters
    from rlm_tasks.settings.llm import EndpointSettings as EndpointSettings
    from rlm_tasks.settings.llm import LlmSettings as LlmSettings
    from rlm_tasks.settings.llm import ModelSettings as ModelSettings
    from rlm_tasks.settings.model import Settings as Settings
    from rlm_tasks.settings.sections import LedgerSettings as LedgerSettings
    from rlm_tasks.settings.sections import MetricsSettings as MetricsSettings
    from rlm_tasks.settings.sections import NodeSettings as NodeSettings
    from rlm_tasks.settings.sections import TracingSettings as TracingSettings

_HOMES = {
    "rlm_tasks.settings.environment": "key_of settings traces_exporters",
    "rlm_tasks.settings.llm": "EndpointSettings LlmSettings ModelSettings",
    "rlm_tasks.settings.model": "Settings",
    "rlm_tasks.settings.sections": "LedgerSettings MetricsSettings NodeSettings TracingSettings",
}
__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
