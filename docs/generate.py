"""Write the generated pages, or fail when one differs from the code.

`docs/configuration.md` comes from the settings, `docs/reference/events.md` from the list of
platform events, `docs/reference/odd_answers.md` from the fake provider's odd answers,
`docs/reference/error_codes.md` from the classes of errors.
``python -m docs.generate`` compares the pages; ``python -m docs.generate --write`` writes them.
`make docs` calls it.  Begin with `PAGES`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import resilience
import rlm_tasks
import scheduler
from resilience.errors import RlmError
from resilience.faults import CODES
from rlm_tasks.llm.wire.errors import FAULTS, REFUSALS
from rlm_tasks.settings.document import fields, variable
from rlm_tasks.testing.odd_answers import ODD_ANSWERS
from scheduler.alerts import RULES
from scheduler.events import KINDS, PRESSURE_CHANGED, EventKind, EventSeverity

HERE = Path(__file__).parent
SETTINGS_HEAD = """# Configuration

Every setting is an environment variable, read once in each process.
Clients and workers of one platform need the same values.

An unknown `RLM_` variable, or a value that cannot be used, stops a process when it starts.
The message names the nearest variable or value.

| command | effect |
|---|---|
| `celery -A rlm_tasks rlm config show` | prints the settings of this environment |
| `celery -A rlm_tasks rlm config check` | reports wrong settings |
| `celery -A rlm_tasks rlm config export` | writes the settings as JSON, without secrets |
| `celery -A rlm_tasks rlm config import` | prints such JSON as environment variables |

This page is generated: `make docs ARGS=--write`.

| variable | default | what it does |
|---|---|---|
"""
EVENTS_HEAD = """# Platform events

A platform event records something that happened on the platform:

```json
{
  "id": "1700000000123-0",
  "at": 1700000000.123,
  "name": "breaker.opened",
  "severity": "warning",
  "message": "breaker llm has opened",
  "data": {"breaker": "llm", "open": ["llm"]}
}
```

All events have these fields; the fields of `data` depend on the name.
[Alerts and events](../pressure.md#alerts-and-events) shows how a client receives events, and
[`Event`](platform.md#scheduler.events.Event) is the record that it gets.

This page is generated: `make docs ARGS=--write`.

| event | severity | when |
|---|---|---|
"""


ODD_ANSWERS_HEAD = """# Odd answers

Real providers, gateways and inference servers give odd answers.
The fake provider gives them on demand, so that you can test yours:

```python
from rlm_tasks.testing.fake_provider import running

with running(schedule=[{"kind": "refused", "every": 3}]) as provider:
    print(provider.base_url.startswith("http://127.0.0.1:"))  # True
```

Every third answer of this provider is a refusal.
A prompt may also ask for an odd answer: `ODD-ANSWER: refused`.
With `ODD-ANSWER: server-error x2` the first two calls of that prompt fail, and the third succeeds.

A provider can also be odd for all of its run.
The options of `running` are those of the command line, and they can be combined:

| option | effect |
|---|---|
| `always="max-tokens-refused"` | it knows only `max_completion_tokens` |
| `always="usage-missing"` | no answer states its usage |
| `context=4096` | a question that has more tokens, with those of its answer, is refused |
| `slots=2` | two answers are made at once, and other questions wait |
| `models_status=403` | the status of `GET /v1/models` |

`provider.report()` has the calls and the billed tokens of each name under `by_kind`.
`python -m rlm_tasks.testing.fake_provider --list` prints this table.
[Language models](../llm.md#each-kind-of-answer) says what a job does with each kind of answer.

This page is generated: `make docs ARGS=--write`.

| group | name | answer |
|---|---|---|
"""


ERROR_CODES_HEAD = """# Error codes

Every error of a call is an [`RlmError`](errors.md).
Its class has the facts of this page:

```python
from rlm_tasks import QueueFull

print(QueueFull.code, QueueFull.retryable, QueueFull.http_status)  # QUEUE_FULL True 503
```

[In a web backend](../existing_apps.md#in-a-web-backend) an error becomes a response with these
statuses.

This page is generated: `make docs ARGS=--write`.

## Errors of calls

"A retry helps" means that the same call may succeed later without any change.

| code | class | meaning | cause | what to do | a retry helps | HTTP |
|---|---|---|---|---|---|---|
"""
ITEM_CODES_HEAD = """
## Codes of failed items

A failed item has one of these codes in [`ItemFailure.code`](results.md#rlm_tasks.ItemFailure), or a
code of the table above.
The job itself may have succeeded, so an item's code has no HTTP status.

| code | cause | what to do | a retry helps |
|---|---|---|---|
"""
HTTP_HEAD = """
## HTTP statuses

| status | meaning |
|---|---|
"""
HTTP_SOURCES = {
    202: "Accepted, not completed: the job goes on (RFC 9110, 15.3.3)",
    403: "Forbidden: the operator does not allow the file (RFC 9110, 15.5.4)",
    404: "Not Found: there is no such job (RFC 9110, 15.5.5)",
    409: "Conflict with the state of the job or its file (RFC 9110, 15.5.10)",
    422: "Unprocessable Content: a request that cannot be carried out (RFC 9110, 15.5.21)",
    429: "Too Many Requests, with `Retry-After` (RFC 6585, 4, and RFC 9110, 10.2.3)",
    500: "Internal Server Error: the operator or the author must act (RFC 9110, 15.6.1)",
    502: "Bad Gateway: a provider gave an answer that cannot be used (RFC 9110, 15.6.3)",
    503: "Service Unavailable for a while, with `Retry-After` if it is known (RFC 9110, 15.6.4)",
    504: "Gateway Timeout: a service or a job took too long (RFC 9110, 15.6.5)",
}
"""Each status of an error -> its meaning and its source."""


def settings_page() -> str:
    """Return the page of settings: a table row for each, sections last."""
    return SETTINGS_HEAD + "\n".join(_settings_rows()) + "\n"


def _settings_rows() -> Iterator[str]:
    for place, field in fields():
        default = json.dumps(field.default) if isinstance(field.default, tuple) else field.default
        default = "" if default in (None, "[]") else default
        yield f"| `{variable(place)}` | `{default}` | {field.description} |".replace(
            "``", "(empty)"
        )


def events_page() -> str:
    """Return the page of platform events: a table of all, then a section for each."""
    rows = [
        f"| [`{kind.name}`](#{kind.name.replace('.', '')}) | {_severity(kind)} | {kind.meaning} |"
        for kind in KINDS.values()
    ]
    return EVENTS_HEAD + "\n".join(rows) + "\n" + "".join(map(_section, KINDS.values()))


def _severity(kind: EventKind) -> str:
    return kind.severity.label if isinstance(kind.severity, EventSeverity) else kind.severity


def _section(kind: EventKind) -> str:
    fields = "\n".join(f"| `{name}` | {content} |" for name, content in kind.fields.items())
    sentences = [kind.meaning, *_alert(kind)]
    text = "\n".join(sentences)
    return f"\n## `{kind.name}`\n\n{text}\n\n| field | content |\n|---|---|\n{fields}\n"


def _alert(kind: EventKind) -> Iterator[str]:
    """Yield a sentence about the alert that an event raises, and one if it is not in the stream."""
    if kind is PRESSURE_CHANGED:
        yield "From elevated on it raises an [alert](../pressure.md#alerts-and-events)."
    elif kind.name in RULES:
        yield "It raises an [alert](../pressure.md#alerts-and-events)."
    if not kind.in_stream:
        yield "It is not in the stream of events."


def odd_answers_page() -> str:
    """Return the page of odd answers: a table row for each."""
    rows = (f"| {odd.group} | `{name}` | {odd.about} |" for name, odd in ODD_ANSWERS.items())
    return ODD_ANSWERS_HEAD + "\n".join(rows) + "\n"


def error_codes_page() -> str:
    """Return the page of error codes: errors by class, codes of items, statuses of HTTP."""
    found = errors()
    statuses = sorted({each.http_status for each in found})
    return "\n".join(
        [
            ERROR_CODES_HEAD.rstrip("\n"),
            *map(_error_row, found),
            ITEM_CODES_HEAD.rstrip("\n"),
            *_item_rows(),
            HTTP_HEAD.rstrip("\n"),
            *(f"| {each} | {HTTP_SOURCES[each]} |" for each in statuses),
            "",
        ]
    )


def errors() -> list[type[RlmError]]:
    """Return all classes of errors, a base before its subclasses."""
    for package in (resilience, scheduler, rlm_tasks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return list(_family(RlmError))


def _family(base: type[RlmError]) -> Iterator[type[RlmError]]:
    """Yield a class and its subclasses in the same order, whatever was imported first."""
    yield base
    for each in sorted(base.__subclasses__(), key=lambda each: (each.__module__, each.__name__)):
        if each.__module__.partition(".")[0] in ("resilience", "scheduler", "rlm_tasks"):
            yield from _family(each)


def _error_row(error: type[RlmError]) -> str:
    meaning = re.split(r"(?<=\.)\s", " ".join(str(error.__doc__).split()))[0]
    is_given = "code" in getattr(error.__init__, "__annotations__", ())  # each instance has its own
    cells = (
        "[see below](#codes-of-failed-items)" if is_given else f"`{error.code}`",
        f"`{error.__name__}`",
        meaning,
        error.when,
        error.remedy,
        "yes" if error.retryable else "no",
        str(error.http_status),
    )
    return f"| {' | '.join(cells)} |"


def _item_rows() -> Iterator[str]:
    for fault, (cause, remedy) in CODES.items():
        yield f"| `{fault.code}` | {cause} | {remedy} | {'yes' if fault.retryable else 'no'} |"
    for code, about in FAULTS.items():
        cause, _, remedy = about.partition("; ")
        yield f"| `{code}` | {_sentence(cause)} | {_sentence(remedy)} | no |"
    for code, (cause, remedy) in REFUSALS.items():
        if code not in {*FAULTS, *(fault.code for fault in CODES)}:
            yield f"| `{code}` | {cause} | {remedy} | no |"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else "Raise `max_tokens`, or change the prompt."


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": settings_page,
    "reference/events.md": events_page,
    "reference/odd_answers.md": odd_answers_page,
    "reference/error_codes.md": error_codes_page,
}
"""Each generated page, with the function that returns its text."""


def main() -> int:
    """Write the pages, or compare them; return 1 when one differs from the code."""
    differs = False
    for name, text in PAGES.items():
        page, wanted = HERE / name, text()
        if "--write" in sys.argv:
            page.write_text(wanted, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != wanted:
            print(f"{name} differs from the code; run: make docs ARGS=--write", file=sys.stderr)
            differs = True
    if differs:
        return 1
    print("docs are written" if "--write" in sys.argv else "docs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
