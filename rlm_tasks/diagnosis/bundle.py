"""What a bug report needs of a platform, as one document that may be shown to strangers.

Decides what is user data: items, parameters, outputs, descriptions, and what exceptions say.  None
of it is read into the document; its kinds, sizes and numbers are.  Refuses to judge what it
collects: the doctor's findings are part of it."""

from __future__ import annotations

import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import msgspec
from packaging.requirements import Requirement
from pydantic import SecretStr

from resilience.breaker import CircuitBreakers
from rlm_tasks.diagnosis import doctor
from rlm_tasks.errors import JobNotFound
from rlm_tasks.ledger.explain import explain
from rlm_tasks.ledger.records import NodeRecord
from rlm_tasks.settings.document import HIDDEN, to_dict
from rlm_tasks.version import __version__

if TYPE_CHECKING:
    from celery import Celery

    from rlm_tasks.client.client import Client
    from rlm_tasks.client.job import Job

SCHEMA = 1
JOBS, NODES, EVENTS, FAILURES = 20, 1000, 100, 100
"""At most so many of each are in a document."""
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
    re.compile(r"://[^/\s:]*:([^\s;,]+)@"),  # a password may hold an @ that nobody has quoted
    re.compile(r"[?&]\w*(?:password|secret|token)=([^&\s;,]+)", re.IGNORECASE),
)
_TELLING = re.compile(r"PASSWORD|SECRET|TOKEN|API_?KEY|ACCESS_KEY|WEBHOOK", re.IGNORECASE)
_T = TypeVar("_T")


def collect(client: Client, app: Celery, job_id: str | None = None) -> dict[str, Any]:
    """Return the document, plain JSON.  Raises JobNotFound for an unknown `job_id`.

    - ``bundle``: the version of this shape
    - ``at``: when it was made, ISO 8601
    - ``versions``: ``python``, ``platform``, ``rlm_tasks``, and ``packages``: name -> version of
      what it needs
    - ``settings``: all settings, as `configuration.to_dict` shows them
    - ``celery``: the app's settings that differ from Celery's defaults; of those that Celery does
      not know, the types
    - ``findings``: the doctor's, each with check, state, found and advice
    - ``status``: `Client.status` but for what stands below
    - ``queues``: name -> depth and age of the oldest message in seconds
    - ``breakers``: name -> state, failures in a row, time of the last one
    - ``limits``: rate limits and bulkheads that operations declare, and how full they are
    - ``alerts``: how many there were, by severity, and the last ten
    - ``events``: the newest events of the platform
    - ``jobs``: the newest jobs: id, state, counts, and why each waits or how it ended
    - ``job``: with `job_id`: what was asked for (kinds and sizes), ``tree``, ``events``,
      ``failures`` by type and code, ``quarantined`` by index; else None

    What cannot be read, while Redis or the broker is away, is ``{"unknown": <the error's type>}``.
    """
    document = {
        "bundle": SCHEMA,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "settings": to_dict(client.settings),
        "celery": _celery(app),
        "findings": [asdict(each) for each in doctor.examine(client, app)],
        "status": _told(lambda: _status(client)),
        "queues": _told(client.queues),
        "breakers": _told(CircuitBreakers(client.ledger.store).status),
        "limits": _told(client.limits),
        "alerts": _told(lambda: _alerts(client)),
        "events": _told(lambda: [each.fields() for each in client.events.recent(EVENTS)]),
        "jobs": _told(lambda: [_outline(client, job.id) for job in client.jobs(JOBS)]),
        "job": _told(lambda: _whole(client, job_id)) if job_id else None,
    }
    secrets = {*_secrets(client.settings.model_dump()), *_secrets(app.conf.table(censored=False))}
    plain = msgspec.to_builtins(document, enc_hook=str)
    return dict(_without(sorted(secrets, key=len, reverse=True), plain))


def _told(read: Callable[[], _T]) -> _T | dict[str, str]:
    try:
        return read()
    except JobNotFound:
        raise
    except (
        Exception
    ) as error:  # what is reported must not be able to stop the report; its text may hold user data
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
    """Return what an app changes of Celery's settings; what Celery does not know may be anything,
    and is told by its type.
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
    """Return where a job stands; its keys only, when it has expired meanwhile."""
    facts = client.ledger.facts(job_id)
    if not facts:
        return {"id": job_id}
    is_over = "closed_ms" in facts
    records = [] if is_over else [_discreet(record) for record in client.ledger.all_records(job_id)]
    return {
        "id": job_id,
        **{name: facts[name] for name in _WORDS if name in facts},
        **{name: int(facts[name]) for name in _COUNTS if name in facts},
        "explain": explain(_without_message(facts), records, client.ledger.store.now_ms()),
    }


def _discreet(record: NodeRecord) -> NodeRecord:
    """Leave out what an operation may have said itself of why it waits; before the colon stands who
    makes it wait.
    """
    return replace(record, why=record.why.partition(": ")[0])


def _without_message(facts: Mapping[str, str]) -> dict[str, str]:
    if not facts.get("error"):
        return dict(facts)
    error = msgspec.json.decode(facts["error"])
    kept = {"type": error["type"], "message": f"({len(error['message'])} characters)"}
    return {**facts, "error": msgspec.json.encode(kept).decode()}


def _whole(client: Client, job_id: str) -> dict[str, Any]:
    job = client.job(job_id)
    tree = job.tree()
    return {
        **_outline(client, job_id),
        "request": _request(client, job_id),
        "tree": [{**asdict(node), "why": node.why.partition(": ")[0]} for node in tree[:NODES]],
        "tree_left_out": max(0, len(tree) - NODES),
        "events": [asdict(each) for each in job.events()[-EVENTS:]],
        "failures": _failures(job),
        "quarantined": [
            {"index": item.index, "attempts": item.attempts, "last_signal": item.last_signal}
            for item in job.quarantined()
        ],
    }


def _request(client: Client, job_id: str) -> dict[str, Any]:
    """Return what was asked for: the settings of the run, and of what is the user's the kinds and
    sizes.
    """
    spec = client.ledger.spec(job_id)
    if spec is None:
        raise JobNotFound(job_id)
    told = {name: value for name, value in msgspec.to_builtins(spec).items() if name not in _USERS}
    return {
        **told,
        "source": type(spec.source).__name__,
        "params": sorted(type(value).__name__ for value in spec.params.values()),
        "params_bytes": len(msgspec.json.encode(spec.params)),
        "description_characters": len(spec.description),
    }


_USERS = {"source", "params", "description", "idempotency_key"}
"""What of a request is its user's own."""


def _failures(job: Job) -> dict[str, Any]:
    """Return what items failed of: how many of each type and code, and the first ones."""
    found = job.failures()
    kinds = Counter((each.type, each.code) for each in found)
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
            for each in found[:FAILURES]
        ],
    }


# --- secrets ----------------------------------------------------------------------------------


def _secrets(settings: Mapping[str, Any], telling: bool = False) -> Iterator[str]:
    """Yield the secrets of a configuration: passwords in URLs, and what stands under a telling
    name.

    They are looked for in the finished document, whatever was left out on the way: an event may
    quote one."""
    for name, told in settings.items():
        is_telling = telling or bool(_TELLING.search(str(name)))
        value = told.get_secret_value() if isinstance(told, SecretStr) else told
        if isinstance(value, Mapping):
            yield from _secrets(value, is_telling)
        elif isinstance(value, str) and value:
            found = [each for pattern in _CREDENTIALS for each in pattern.findall(value)]
            yield from (
                part
                for each in (*found, *([value] if is_telling else ()))
                for part in (each, unquote(each))
            )


def _without(secrets: Sequence[str], value: Any) -> Any:
    """Return plain data without the secrets, the longest of which come first."""
    if isinstance(value, dict):
        return {_without(secrets, name): _without(secrets, each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without(secrets, each) for each in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
    return value
