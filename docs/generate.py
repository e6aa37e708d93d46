"""Write the generated pages, or fail when one differs from the code.

`docs/configuration.md` comes from the settings, `docs/reference/events.md` from the list of
platform events, `docs/reference/odd_answers.md` from the fake provider's odd answers.
``python -m docs.generate`` compares the pages; ``python -m docs.generate --write`` writes them.
`make docs` calls it.  Begin with `PAGES`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": settings_page,
    "reference/events.md": events_page,
    "reference/odd_answers.md": odd_answers_page,
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
