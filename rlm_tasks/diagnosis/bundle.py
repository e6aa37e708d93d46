"""The bundle for a bug report: one document about a platform that may be shown to strangers.

`rlm bundle` calls `collect`.  User data are items, parameters, outputs, descriptions, and the texts
of exceptions.  The document has only their types, sizes and numbers.  The doctor's findings are a
part of it.
"""

from __future__ import annotations

import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import msgspec
from packaging.requirements import Requirement
from pydantic import SecretStr

from resilience.breaker import CircuitBreakers
from rlm_tasks.diagnosis import doctor
from rlm_tasks.errors import JobNotFound
from rlm_tasks.settings.document import HIDDEN, to_dict
from rlm_tasks.version import __version__

if TYPE_CHECKING:
    from celery import Celery

    from rlm_tasks.client.client import Client
    from rlm_tasks.client.job import Job

SCHEMA = 1
JOBS, NODES, EVENTS, FAILURES = 20, 1000, 100, 100
"""The most of each in one document."""
_COUNTS = (
    "n",
    "done",
    "failed",
    "skipped",
    "pending",
    "nodes",
    "splits",
    "yields",
    "depth",
    "validated",
    "busy_us",
    "peak_kb",
    "opened_ms",
    "started_ms",
    "stop_ms",
    "closed_ms",
    "deadline",
    "ttl_s",
    "schema",
)
_WORDS = ("state", "phase", "stop", "queue")
_CREDENTIALS = (
    re.compile(r"://[^/\s:]*:([^\s;,]+?)@"),
    re.compile(r"://[^/\s:]*:([^\s;,]+)@"),  # a password may hold an @ that is not quoted
    re.compile(r"[?&]\w*(?:password|secret|token)=([^&\s;,]+)", re.IGNORECASE),
)
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|API_?KEY|ACCESS_KEY|WEBHOOK", re.IGNORECASE)
_T = TypeVar("_T")


def collect(client: Client, app: Celery, job_id: str | None = None) -> dict[str, Any]:
    """Return the document, plain JSON.  Raises JobNotFound for an unknown `job_id`.

    - ``bundle``: the version of this form
    - ``at``: the time of the document, ISO 8601
    - ``versions``: ``python``, ``platform``, ``rlm_tasks``, and ``packages``: name -> version of
      each package that it needs
    - ``settings``: all settings, in the form of `settings.document.to_dict`
    - ``celery``: the app's settings that differ from Celery's defaults; unknown ones by type only
    - ``findings``: the doctor's, each with check, state, found and advice
    - ``status``: `Client.status`, without the parts that follow here
    - ``queues``: name -> depth and age of the oldest message in seconds
    - ``breakers``: name -> state, failures in a row, time of the last one
    - ``limits``: the rate limits and bulkheads that operations declare, and how full they are
    - ``alerts``: their number by severity, and the last ten
    - ``events``: the newest events of the platform
    - ``jobs``: the newest jobs: id, state, counts, and why each waits or how it ended
    - ``job``: with `job_id`: the request (types and sizes), ``tree``, ``events``, ``failures`` by
      type and code, ``quarantined`` by index; else None

    A part that cannot be read, because Redis or the broker is away, is
    ``{"unknown": <the error's type>}``.
    """
    document = {
        "bundle": SCHEMA,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "settings": to_dict(client.settings),
        "celery": _celery(app),
        "findings": [asdict(each) for each in doctor.examine(client, app)],
        "status": _read_or_error(lambda: _status(client)),
        "queues": _read_or_error(client.queues),
        "breakers": _read_or_error(CircuitBreakers(client.ledger.store).status),
        "limits": _read_or_error(client.limits),
        "alerts": _read_or_error(lambda: _alerts(client)),
        "events": _read_or_error(lambda: [each.fields() for each in client.events.recent(EVENTS)]),
        "jobs": _read_or_error(lambda: [_outline(client, job.id) for job in client.jobs(JOBS)]),
        "job": _read_or_error(lambda: _whole(client, job_id)) if job_id else None,
    }
    secrets = {*_secrets(client.settings.model_dump()), *_secrets(app.conf.table(censored=False))}
    plain = msgspec.to_builtins(document, enc_hook=str)
    return dict(_without(sorted(secrets, key=len, reverse=True), plain))


def _read_or_error(read: Callable[[], _T]) -> _T | dict[str, str]:
    try:
        return read()
    except JobNotFound:
        raise
    except Exception as error:  # one part must not stop the report; the text may hold user data
        return {"unknown": type(error).__name__}


# --- this process -----------------------------------------------------------------------------


def _versions() -> dict[str, Any]:
    names = sorted(
        {Requirement(each).name for each in doctor.requirements() or ("celery", "kombu", "redis")}
    )
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "rlm_tasks": __version__,
        "packages": {name: version for name in names if (version := doctor.installed(name))},
    }


def _celery(app: Celery) -> dict[str, Any]:
    """Return the settings of Celery that an app changes.

    A setting that Celery does not know may hold anything, so only its type is shown.
    """
    from celery.app.defaults import DEFAULTS

    changed = app.conf.table(with_defaults=False, censored=True)
    shown = {
        name: value if name in DEFAULTS else f"({type(value).__name__})"
        for name, value in changed.items()
    }
    if "beat_schedule" in shown:  # entries carry arguments
        shown["beat_schedule"] = sorted(shown["beat_schedule"] or ())
    return {name: shown[name] for name in sorted(shown)}


# --- the platform -----------------------------------------------------------------------------


def _status(client: Client) -> dict[str, Any]:
    elsewhere = {"circuit_breakers", "queues", "recent_events", "recent_pressure_events"}
    return {
        name: value for name, value in client.status().to_dict().items() if name not in elsewhere
    }


def _alerts(client: Client) -> dict[str, Any]:
    return client.alerts.summary()


# --- jobs -------------------------------------------------------------------------------------


def _outline(client: Client, job_id: str) -> dict[str, Any]:
    """Return the state and counts of a job; only its id if it has expired meanwhile."""
    facts = client.ledger.facts(job_id)
    if not facts:
        return {"id": job_id}
    explained = client.job(job_id).explain(message=False)
    if facts.get("stop_by"):  # it names a person
        explained = explained.replace(f" by {facts['stop_by']}", "")
    return {
        "id": job_id,
        **{name: facts[name] for name in _WORDS if name in facts},
        **{name: int(facts[name]) for name in _COUNTS if name in facts},
        "explain": explained,
    }


def _whole(client: Client, job_id: str) -> dict[str, Any]:
    job = client.job(job_id)
    tree = job.tree(NODES, message=False)
    return {
        **_outline(client, job.id),
        "request": _request(client, job.id),
        "tree": [asdict(node) for node in tree],
        "tree_left_out": tree.total - len(tree),
        "events": [asdict(each) for each in job.events()[-EVENTS:]],
        "failures": _failures(job),
        "quarantined": [
            {"index": item.index, "attempts": item.attempts, "last_signal": item.last_signal}
            for item in job.quarantined()
        ],
    }


def _request(client: Client, job_id: str) -> dict[str, Any]:
    """Return a job's request: all settings of the run; of user data, types and sizes only."""
    spec = client.ledger.spec(job_id)
    if spec is None:
        raise JobNotFound(job_id)
    fields = msgspec.to_builtins(msgspec.structs.replace(spec, params={}, packed_params=b""))
    return {
        **{name: value for name, value in fields.items() if name not in _USER_FIELDS},
        "source": type(spec.source).__name__,
        "params": sorted(type(value).__name__ for value in spec.params.values()),
        "params_bytes": len(spec.packed_params),
        "description_characters": len(spec.description),
    }


_USER_FIELDS = {"source", "params", "description", "idempotency_key"}
"""Fields of a request that hold user data."""


def _failures(job: Job) -> dict[str, Any]:
    """Return the failures of items: their number by type and code, and the first ones."""
    failures = job.failures()
    kinds = Counter((each.type, each.code) for each in failures)
    return {
        "kinds": [
            {"type": type, "code": code, "items": count}
            for (type, code), count in kinds.most_common()
        ],
        "first": [
            {
                "index": each.index,
                "type": each.type,
                "code": each.code,
                "message_characters": len(each.message),
            }
            for each in failures[:FAILURES]
        ],
    }


# --- secrets ----------------------------------------------------------------------------------


def _secrets(settings: Mapping[str, Any], secret: bool = False) -> Iterator[str]:
    """Yield the secrets of a configuration: passwords in URLs, and values under a secret's name.

    The finished document is searched for them, because any part of it, such as an event, may quote
    one.
    """
    for name, hidden in settings.items():
        is_secret = secret or bool(_SECRET_NAME.search(str(name)))
        value = hidden.get_secret_value() if isinstance(hidden, SecretStr) else hidden
        if isinstance(value, Mapping):
            yield from _secrets(value, is_secret)
        elif isinstance(value, str) and value:
            passwords = [each for pattern in _CREDENTIALS for each in pattern.findall(value)]
            yield from (
                part
                for each in (*passwords, *([value] if is_secret else ()))
                for part in (each, unquote(each))
            )


def _without(secrets: Sequence[str], value: Any) -> Any:
    """Return plain data without the secrets, which are sorted with the longest first."""
    if isinstance(value, dict):
        return {_without(secrets, name): _without(secrets, each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without(secrets, each) for each in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
    return value
