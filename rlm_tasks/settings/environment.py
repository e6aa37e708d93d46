"""The settings of this process: the only module that reads the environment.

`Client` and `install` call `settings`; the calls to models ask for keys with `key_of`.
"""

from __future__ import annotations

import getpass
import os
import socket
from functools import cache

from rlm_tasks.errors import InvalidSettings
from rlm_tasks.settings.model import Settings

_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def traces_exporters() -> list[str]:
    """Return the names of the exporters of traces, from the variables of OpenTelemetry.

    Its packages read all other variables; these are for its launcher, which workers do without.
    """
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    otlp = _OTLP.get(os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or protocol, protocol)
    names = (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").replace(" ", "").split(",")
    return [otlp if name == "otlp" else name for name in names if name != "none"]


def own_name() -> str:
    """Return the user and the host of this process, as "anna@web-1".

    The ledger keeps it with a job that this process cancels.  It is a note for people: it is not
    verified, and another process may give another name.
    """
    try:
        import pwd  # Windows has none

        user = pwd.getpwuid(os.getuid()).pw_name
    except ImportError:
        user = getpass.getuser()
    except KeyError:  # a container whose user has no entry
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def key_of(variable: str) -> str:
    """Return the key of a provider from its variable; '' when the variable is not set."""
    return os.environ.get(variable, "").strip()


@cache
def settings() -> Settings:
    """Return the settings of this process, read from the environment once.

    Raises InvalidSettings with each variable that is unknown or has an invalid value.
    """
    from rlm_tasks.settings.document import validate

    if issues := validate(os.environ):
        raise InvalidSettings(issues)
    return Settings()
