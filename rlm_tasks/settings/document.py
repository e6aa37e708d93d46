"""The whole configuration as a document: what is wrong with it, what it says without its secrets,
and how it travels.

Decides how a mistake is told (the variable, the value, the nearest that would do) and what counts
as a secret.  Refuses to read the environment, which it is given, and to know what any setting is
used for."""

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

PREFIX, DELIMITER = "RLM_", "__"
HIDDEN = "***"
_TELLING = re.compile(r"SECRET|PASSWORD|TOKEN|KEY")
"""An unknown variable of such a name is not shown with its value."""
_LINK = re.compile(
    r"\w+_(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT(_\d+_(TCP|UDP)(_\w+)?=.*|=(tcp|udp)://.*))"
)
"""Variables by which Kubernetes and Docker tell where a service is: one named ``rlm-...`` begins
them with RLM_.
"""
_CHOICE = re.compile(r"'([^']*)'")


# --- what there is ----------------------------------------------------------------------------


def fields(
    model: type[BaseModel] = Settings, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield each setting with its place among the sections, in the order of the model, sections
    last.
    """
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from fields(type(field.default), (*at, name))
        else:
            yield (*at, name), field


def variable(place: Sequence[str]) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + DELIMITER.join(place).upper()


def _names() -> dict[str, FieldInfo]:
    return {variable(place): field for place, field in fields()}


@dataclass(frozen=True, slots=True)
class Described:
    """One setting, for a person: secrets are hidden."""

    variable: str
    value: Any
    default: Any
    about: str
    changed: bool


def described(settings: Settings) -> list[Described]:
    """Return every setting, in the order of the model, sections last."""
    return [
        Described(
            variable=variable(place),
            value=_without_secret(field, value := _value(settings, place)),
            default=_without_secret(field, field.default),
            about=field.description or "",
            changed=value != field.default,
        )
        for place, field in fields()
    ]


# --- what is wrong ----------------------------------------------------------------------------


def validate(environ: Mapping[str, str], build: Callable[[], Settings] = Settings) -> list[str]:
    """Return what is wrong with the variables of a process, a sentence for each; none when it may
    start.

    `build` makes the settings of that environment, and raises what pydantic raises.
    """
    found = [
        _unknown(name, environ[name])
        for name in sorted(environ)
        if name.startswith(PREFIX)
        and not (_is_known(name) or _LINK.fullmatch(f"{name}={environ[name]}"))
    ]
    try:
        build()
    except ValidationError as error:
        found += [
            _invalid(each, environ) for each in error.errors() if not _is_unknown(each)
        ]  # those stand there already
    except SettingsError as error:
        found.append(_unreadable(error, environ))
    return found


def _is_known(name: str) -> bool:
    names = _names()
    mappings = tuple(
        each + DELIMITER for each, field in names.items() if get_origin(field.annotation) is dict
    )
    sections = {variable(place[:-1]) for place, _ in fields() if len(place) > 1}
    return name in names or name in sections or name.startswith(mappings)


def _unknown(name: str, value: str) -> str:
    near = difflib.get_close_matches(name, _names(), n=1)
    advice = f"did you mean {near[0]}?" if near else "docs/configuration.md lists all; unset it"
    return f"{name}={_shown(name, value)}: there is no such setting; {advice}"


def _shown(name: str, value: Any) -> str:
    field = _names().get(name)
    secret = not field.repr if field else bool(_TELLING.search(name))
    return HIDDEN if secret else repr(masked(value) if isinstance(value, str) else value)


def _is_unknown(error: ErrorDetails) -> bool:
    return error["type"] == "extra_forbidden" and not _holder(error)


def _holder(error: ErrorDetails) -> str:
    """Return the setting whose JSON has what is wrong inside of it, '' where it is a setting
    itself.
    """
    place = [str(part) for part in error["loc"]]
    outer = (variable(place[:end]) for end in range(1, len(place)))
    return next((name for name in outer if name in _names()), "")


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_of(inner)


def _no_such_field(holder: str, error: ErrorDetails) -> str:
    """Say which fields there are, and nothing of the value: it may be a key that its owner put
    there.
    """
    known = [
        name for model in _models_of(_names()[holder].annotation) for name in model.model_fields
    ]
    return f"{holder}: {error['loc'][-1]!r} is no field of it; there are {', '.join(known)}"


def _invalid(error: ErrorDetails, environ: Mapping[str, str]) -> str:
    if error["type"] == "extra_forbidden" and (holder := _holder(error)):
        return _no_such_field(holder, error)
    place = [str(part) for part in error["loc"]]
    name = variable(place)
    alias = next(
        (alias for alias, (path, _) in ALIASES.items() if list(path) == place and alias in environ),
        name,
    )
    asked = name if name in environ else alias
    value = environ.get(asked, error["input"])
    if isinstance(value, BaseModel | dict):  # a rule between several settings of a section
        return f"{name}: {_advice(error)}"
    return f"{asked}={_shown(name, value)}: {_advice(error)}"


def _advice(error: ErrorDetails) -> str:
    choices = (
        _CHOICE.findall(error.get("ctx", {}).get("expected", ""))
        if error["type"] == "literal_error"
        else []
    )
    near = difflib.get_close_matches(str(error["input"]), choices, n=1)
    said = error["msg"].removeprefix("Value error, ")
    return f"must be one of {', '.join(choices)}; did you mean {near[0]}?" if near else said


def _unreadable(error: SettingsError, environ: Mapping[str, str]) -> str:
    """Name the variable whose JSON cannot be read; pydantic tells the outermost field."""
    told = re.search(r'field "(\w+)"', str(error))
    names = [name for name in environ if told and name.startswith(variable([told[1]]))]
    return "; ".join(f"{name}={_shown(name, environ[name])}: is not JSON" for name in names) or str(
        error
    )


# --- how it travels ---------------------------------------------------------------------------


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return all settings as plain data, sections as dicts, secrets and passwords in URLs as
    ``***``.
    """
    return _plain(settings, lambda _, value: value)


def export_config(settings: Settings) -> str:
    """Return all settings as JSON, but for those that hold a secret: they stay with the process
    they are of.
    """
    return json.dumps(
        _plain(settings, lambda place, value: None if _is_secret(place, value) else value), indent=2
    )


def import_config(text: str) -> Settings:
    """Return the settings a JSON document says; what it leaves out is as the environment says.

    Raises InvalidSettings, which names the place, the value and the nearest that would do.
    """
    document = document_of(text)
    told = {variable(place): value for place, value in _leaves(document)}
    if found := [_unknown(name, str(value)) for name, value in told.items() if not _is_known(name)]:
        raise InvalidSettings(found)
    try:
        return Settings(**document)
    except ValidationError as error:
        raise InvalidSettings([_invalid(each, told) for each in error.errors()]) from None


def document_of(text: str | bytes) -> dict[str, Any]:
    """Return the object that a configuration's text is.  Raises InvalidSettings."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidSettings([f"the configuration is not JSON: {error}"]) from None
    if not isinstance(document, dict):
        raise InvalidSettings(
            [f"the configuration is {type(document).__name__}; give an object, as `export` does"]
        )
    return document


def as_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that make these settings, those at their default and secrets left
    out.
    """
    found = {}
    for place, field in fields():
        value = _value(settings, place)
        if (
            place[-1] in _value(settings, place[:-1]).model_fields_set
            and value != field.default
            and not _is_secret(place, value)
        ):
            found[variable(place)] = _told(field, value)
    return found


def _told(field: FieldInfo, value: Any) -> str:
    if NoDecode in field.metadata:
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def _plain(settings: Settings, told: Callable[[tuple[str, ...], Any], Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for place, field in fields():
        value = told(place, _value(settings, place))
        if value is None and field.default is not None:
            continue
        inner = document
        for section in place[:-1]:
            inner = inner.setdefault(section, {})
        inner[place[-1]] = _without_secret(field, value)
    return document


def _value(settings: Settings, place: Sequence[str]) -> Any:
    value: Any = settings
    for name in place:
        value = getattr(value, name)
    return value


def _is_secret(place: tuple[str, ...], value: Any) -> bool:
    return bool(value) and (
        not dict(fields())[place].repr or (isinstance(value, str) and masked(value) != value)
    )


def _without_secret(field: FieldInfo, value: Any) -> Any:
    if not field.repr and value:
        return HIDDEN
    if isinstance(value, SecretStr):
        return ""
    return (
        masked(value)
        if isinstance(value, str)
        else list(value)
        if isinstance(value, tuple)
        else value
    )


def _leaves(
    document: Mapping[str, Any], at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    sections = {place[:-1] for place, _ in fields()}
    for name, value in document.items():
        if isinstance(value, dict) and (*at, name) in sections:
            yield from _leaves(value, (*at, name))
        else:
            yield (*at, name), value
