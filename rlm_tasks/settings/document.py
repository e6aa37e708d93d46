"""The whole configuration as a document: its mistakes, its values, export and import.

`environment` calls `validate` at the start of each process; the command line and the bug bundle
call the others.  A mistake is named by its variable and value, with the nearest valid name or
value.  Secrets are hidden.  The environment is an argument here; this module does not read it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import NoDecode, SettingsError

from resilience.settings import ALIASES
from resilience.store import masked
from rlm_tasks.errors import InvalidSettings
from rlm_tasks.settings.model import Settings
from scheduler.board import fingerprint

PREFIX, DELIMITER = "RLM_", "__"
HIDDEN = "***"
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|KEY")
"""The value of an unknown variable with such a name is hidden."""
_LINK = re.compile(
    r"\w+_(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT(_\d+_(TCP|UDP)(_\w+)?=.*|=(tcp|udp)://.*))"
)
"""Variables with the address of a service, as Kubernetes and Docker set them.

For a service named ``rlm-...`` they begin with RLM_ too, and are no settings of ours."""
_CHOICE = re.compile(r"'([^']*)'")


# --- all settings -----------------------------------------------------------------------------


def fields(
    model: type[BaseModel] = Settings, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield the path of each setting (sections, then its name) and its field.

    They come in the order of the model, sections last.
    """
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from fields(type(field.default), (*at, name))
        else:
            yield (*at, name), field


def variable(path: Sequence[str]) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + DELIMITER.join(path).upper()


def _names() -> dict[str, FieldInfo]:
    return {variable(path): field for path, field in fields()}


@dataclass(frozen=True, slots=True)
class Described:
    """One setting as people see it: secrets are hidden."""

    variable: str
    value: Any
    default: Any
    about: str
    changed: bool


def described(settings: Settings) -> list[Described]:
    """Return every setting, in the order of the model, sections last."""
    return [
        Described(
            variable=variable(path),
            value=_without_secret(field, value := _value(settings, path)),
            default=_without_secret(field, field.default),
            about=field.description or "",
            changed=value != field.default,
        )
        for path, field in fields()
    ]


PER_PROCESS = frozenset(
    variable(path.split("."))
    for path in (
        *("redis_url", "broker_url", "result_backend", "operations", "files_root", "slots"),
        *("ready_file", "log_format", "max_result_bytes", "metrics.address"),
        *("pressure.max_memory_mb", "tracing.enabled", "tracing.sample_rate"),
    )
)
"""Settings that may differ between the processes of one platform."""


def fingerprints(settings: Settings) -> dict[str, str]:
    """Return variable -> fingerprint of each changed setting that processes should share.

    It has no secret: a secret's value is left out.
    """
    return {
        each.variable: fingerprint(repr(each.value))
        for each in described(settings)
        if each.changed and each.variable not in PER_PROCESS and each.value != HIDDEN
    }


# --- mistakes ---------------------------------------------------------------------------------


def validate(environ: Mapping[str, str], build: Callable[[], Settings] = Settings) -> list[str]:
    """Return a sentence for each mistake in the variables of a process; none when it may start.

    `build` makes the settings of that environment, and raises the errors of pydantic.
    """
    mistakes = [
        _unknown(name, environ[name])
        for name in sorted(environ)
        if name.startswith(PREFIX)
        and not (_is_known(name) or _LINK.fullmatch(f"{name}={environ[name]}"))
    ]
    try:
        build()
    except ValidationError as error:
        # Unknown variables are in the list already.
        mistakes += [_invalid(each, environ) for each in error.errors() if not _is_unknown(each)]
    except SettingsError as error:
        mistakes.append(_unreadable(error, environ))
    return mistakes


def _is_known(name: str) -> bool:
    names = _names()
    mappings = tuple(
        each + DELIMITER for each, field in names.items() if get_origin(field.annotation) is dict
    )
    sections = {variable(path[:-1]) for path, _ in fields() if len(path) > 1}
    return name in names or name in sections or name.startswith(mappings)


def _unknown(name: str, value: str) -> str:
    near = difflib.get_close_matches(name, _names(), n=1)
    advice = f"did you mean {near[0]}?" if near else "docs/configuration.md lists all; unset it"
    return f"{name}={_shown(name, value)}: there is no such setting; {advice}"


def _shown(name: str, value: Any) -> str:
    field = _names().get(name)
    secret = not field.repr if field else bool(_SECRET_NAME.search(name))
    return HIDDEN if secret else repr(masked(value) if isinstance(value, str) else value)


def _is_unknown(error: ErrorDetails) -> bool:
    return error["type"] == "extra_forbidden" and not _holder(error)


def _holder(error: ErrorDetails) -> str:
    """Return the setting whose JSON contains the mistake; '' where the setting itself is wrong."""
    path = [str(part) for part in error["loc"]]
    outer = (variable(path[:end]) for end in range(1, len(path)))
    return next((name for name in outer if name in _names()), "")


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_of(inner)


def _no_such_field(holder: str, error: ErrorDetails) -> str:
    """Return a sentence with the known fields, without the value: it may be a secret."""
    known = [
        name for model in _models_of(_names()[holder].annotation) for name in model.model_fields
    ]
    return f"{holder}: {error['loc'][-1]!r} is no field of it; its fields are {', '.join(known)}"


def _invalid(error: ErrorDetails, environ: Mapping[str, str]) -> str:
    if error["type"] == "extra_forbidden" and (holder := _holder(error)):
        return _no_such_field(holder, error)
    path = [str(part) for part in error["loc"]]
    name = variable(path)
    alias = next(
        (
            alias
            for alias, (known, _) in ALIASES.items()
            if list(known) == path and alias in environ
        ),
        name,
    )
    name_in_use = name if name in environ else alias
    value = environ.get(name_in_use, error["input"])
    if isinstance(value, BaseModel | dict):  # a rule between several settings of a section
        return f"{name}: {_advice(error)}"
    return f"{name_in_use}={_shown(name, value)}: {_advice(error)}"


def _advice(error: ErrorDetails) -> str:
    choices = (
        _CHOICE.findall(error.get("ctx", {}).get("expected", ""))
        if error["type"] == "literal_error"
        else []
    )
    near = difflib.get_close_matches(str(error["input"]), choices, n=1)
    message = error["msg"].removeprefix("Value error, ")
    return f"must be one of {', '.join(choices)}; did you mean {near[0]}?" if near else message


def _unreadable(error: SettingsError, environ: Mapping[str, str]) -> str:
    """Return a sentence with the variable whose JSON cannot be read.

    The error of pydantic has the outermost field only.
    """
    field = re.search(r'field "(\w+)"', str(error))
    names = [name for name in environ if field and name.startswith(variable([field[1]]))]
    return "; ".join(f"{name}={_shown(name, environ[name])}: is not JSON" for name in names) or str(
        error
    )


# --- export and import ------------------------------------------------------------------------


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return all settings as plain data: sections as dicts, secrets and passwords as ``***``."""
    return _plain(settings, lambda _, value: value)


def export_config(settings: Settings) -> str:
    """Return all settings as JSON, without those that hold a secret."""
    return json.dumps(
        _plain(settings, lambda path, value: None if _is_secret(path, value) else value), indent=2
    )


def import_config(text: str) -> Settings:
    """Return the settings of a JSON document; the environment sets those that it lacks.

    Raises InvalidSettings with the variable, the value and the nearest valid name or value.
    """
    document = document_of(text)
    values = {variable(path): value for path, value in _leaves(document)}
    unknown = [_unknown(name, str(value)) for name, value in values.items() if not _is_known(name)]
    if unknown:
        raise InvalidSettings(unknown)
    try:
        return Settings(**document)
    except ValidationError as error:
        raise InvalidSettings([_invalid(each, values) for each in error.errors()]) from None


def document_of(text: str | bytes) -> dict[str, Any]:
    """Return a configuration's text as a dict.  Raises InvalidSettings for other JSON."""
    try:
        document = json.loads(text)
    except (TypeError, ValueError) as error:
        raise InvalidSettings([f"the configuration is not JSON: {error}"]) from None
    if not isinstance(document, dict):
        raise InvalidSettings(
            [f"the configuration is {type(document).__name__}; it must be a JSON object"]
        )
    return document


def as_environment(settings: Settings) -> dict[str, str]:
    """Return the variables for these settings, without defaults and secrets."""
    variables = {}
    for path, field in fields():
        value = _value(settings, path)
        if (
            path[-1] in _value(settings, path[:-1]).model_fields_set
            and value != field.default
            and not _is_secret(path, value)
        ):
            variables[variable(path)] = _as_text(field, value)
    return variables


def _as_text(field: FieldInfo, value: Any) -> str:
    if NoDecode in field.metadata:
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(_as_json(value))


def _as_json(value: Any, text: Callable[[str], str] = str) -> Any:
    """Return a value as plain data, with each text in it changed by `text`."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict):
        return {name: _as_json(each, text) for name, each in value.items()}
    return [_as_json(each, text) for each in value] if isinstance(value, list | tuple) else value


def _plain(settings: Settings, shown: Callable[[tuple[str, ...], Any], Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, field in fields():
        value = shown(path, _value(settings, path))
        if value is None and field.default is not None:
            continue
        inner = document
        for section in path[:-1]:
            inner = inner.setdefault(section, {})
        inner[path[-1]] = _without_secret(field, value)
    return document


def _value(settings: Settings, path: Sequence[str]) -> Any:
    value: Any = settings
    for name in path:
        value = getattr(value, name)
    return value


def _is_secret(path: tuple[str, ...], value: Any) -> bool:
    return bool(value) and (
        not dict(fields())[path].repr or (isinstance(value, str) and masked(value) != value)
    )


def _without_secret(field: FieldInfo, value: Any) -> Any:
    if not field.repr and value:
        return HIDDEN
    if isinstance(value, SecretStr):
        return ""
    return _as_json(value, masked)


def _leaves(
    document: Mapping[str, Any], at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    sections = {path[:-1] for path, _ in fields()}
    for name, value in document.items():
        if isinstance(value, dict) and (*at, name) in sections:
            yield from _leaves(value, (*at, name))
        else:
            yield (*at, name), value
