"""The one place that reads the environment."""

from __future__ import annotations

import os
from functools import cache

from rlm_tasks.errors import InvalidSettings
from rlm_tasks.settings.model import Settings

_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def traces_exporters() -> list[str]:
    """Return the exporters that OpenTelemetry's variables name; its packages read the others, this
    one is for their launcher.
    """
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    otlp = _OTLP.get(os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or protocol, protocol)
    names = (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").replace(" ", "").split(",")
    return [otlp if name == "otlp" else name for name in names if name != "none"]


def key_of(variable: str) -> str:
    """Return the key of a provider, which its own variable holds; '' when that is not set."""
    return os.environ.get(variable, "").strip()


@cache
def settings() -> Settings:
    """Return the settings of this process, read from the environment once.

    Raises InvalidSettings naming each variable that is unknown, or whose value cannot be used.
    """
    from rlm_tasks.settings.document import validate

    if issues := validate(os.environ):
        raise InvalidSettings(issues)
    return Settings()
