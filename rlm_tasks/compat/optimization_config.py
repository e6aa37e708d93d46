"""The 28 configuration keys of other orchestrators, each mapped to a setting of this platform.

Users and `rlm config optimization` call it.  A key sets an environment variable, or has the reason
why it sets none.  A configuration is checked only by `validate`, and works in processes that start
with its variables; running processes do not change.  Begin with `OptimizationConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from typing import Any

from rlm_tasks.client.performance_stats import _CACHE
from rlm_tasks.errors import InvalidRequest, InvalidSettings
from rlm_tasks.settings.document import document_of

_POOL = "pool processes are reused instead, and a step allocates no objects that a pool could reuse"
_DEFAULT = "for breakers that declare no other value"
_BATCHED = "spans always leave a worker in batches"

Text = Callable[[Any], str | None]
"""Returns the text of a value in an environment variable; None where it sets nothing."""


def _json(value: Any) -> str:
    return json.dumps(value)


def _milliseconds(value: float) -> str:
    return str(round(1000 * value))


def _or_zero(value: int | None) -> str:
    return str(value or 0)


def _zero_when_off(value: bool) -> str | None:
    return None if value else "0"


def _key(
    default: Any,
    *,
    sets: str = "",
    text: Text = _json,
    why: str = "",
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """Declare a key with its bounds.

    `sets` is its variable and `text` makes the variable's value; or `why` has the reason for none.
    """
    return field(
        default=default,
        metadata={"sets": sets, "text": text, "why": why, "least": least, "most": most},
    )


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of one key."""

    key: str
    value: Any
    sets: str  # VARIABLE=value; '' when it sets nothing
    why: str  # the reason if it sets nothing, else a note


@dataclass(kw_only=True)
class OptimizationConfig:
    """The keys that other orchestrators use, with their defaults there; attributes may be changed.

    An unknown key raises InvalidRequest, which names the nearest one.  Only `validate` checks
    values.
    """

    enable_object_pool: bool = _key(True, why=_POOL)
    object_pool_max_size: int = _key(50, why=_POOL, least=1)
    object_pool_cleanup_threshold: float = _key(0.9, why=_POOL, least=0, most=1)
    enable_context_optimization: bool = _key(
        True, why="an item's context is made from its node's; no context is copied or merged"
    )
    enable_memory_optimization: bool = _key(
        True, sets="RLM_PRESSURE__ENABLED", why="pressure of memory, and of CPU too"
    )
    enable_step_optimization: bool = _key(
        True, why="an operation is analysed once, when it is declared"
    )
    enable_algorithm_optimization: bool = _key(
        True, why="packing is always fast: MessagePack, compressed where that saves space"
    )
    enable_concurrency_optimization: bool = _key(
        True,
        sets="RLM_AUTOSCALE__ENABLED",
        why="for pools that are started with `--autoscale`, and for batches",
    )
    max_concurrent_executions: int | None = _key(
        None,
        sets="RLM_SLOTS",
        text=_or_zero,
        why="pool processes of each worker; 0: one for each CPU",
        least=1,
    )
    enable_optimized_telemetry: bool = _key(
        True, why=f"{_BATCHED}; `RLM_TRACING__ENABLED` turns them on"
    )
    enable_performance_monitoring: bool = _key(
        True, sets="RLM_SNAPSHOTS__ENABLED", why="beat must run"
    )
    telemetry_batch_size: int = _key(
        10,
        sets="OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        why="OpenTelemetry's own variable",
        least=1,
        most=2048,
    )
    telemetry_flush_interval_seconds: float = _key(
        30.0,
        sets="OTEL_BSP_SCHEDULE_DELAY",
        text=_milliseconds,
        why="OpenTelemetry's own variable, in ms",
        least=0.001,
    )
    enable_optimized_error_handling: bool = _key(
        True,
        sets="RLM_FAULT_PATTERNS",
        text=_zero_when_off,
        why="if on, `error_cache_size` is the number of faults that are kept",
    )
    enable_circuit_breaker: bool = _key(True, sets="RLM_BREAKERS__ENABLED", why="for all breakers")
    error_cache_size: int = _key(
        50,
        sets="RLM_FAULT_PATTERNS",
        why="0 while `enable_optimized_error_handling` is off",
        least=1,
    )
    circuit_breaker_failure_threshold: int = _key(
        10, sets="RLM_BREAKERS__FAILURE_THRESHOLD", why=_DEFAULT, least=1
    )
    circuit_breaker_recovery_timeout_seconds: float = _key(
        60, sets="RLM_BREAKERS__RECOVERY_TIMEOUT_S", why=_DEFAULT, least=0.001
    )
    enable_cache_optimization: bool = _key(False, why=_CACHE)
    cache_compression: bool = _key(False, why=_CACHE)
    cache_ttl_seconds: float = _key(7200, why=_CACHE, least=0.001)
    cache_max_size: int = _key(500, why=_CACHE, least=1)
    slow_execution_threshold_ms: float = _key(
        1000.0, sets="RLM_ALERTS__SLOW_EXECUTION_MS", why="time of one item", least=0.001
    )
    memory_pressure_threshold_mb: float = _key(
        500.0, sets="RLM_ALERTS__MEMORY_MB", why="memory of one pool process", least=0.001
    )
    cpu_usage_threshold_percent: float = _key(
        80.0,
        sets="RLM_ALERTS__CPU_PCT",
        why="CPU of a host; it raises an alert, and no work is left out",
        least=0.001,
        most=100,
    )
    enable_automatic_optimization: bool = _key(
        False, why="the platform never changes a setting by itself"
    )
    optimization_analysis_interval_seconds: float = _key(
        60.0,
        sets="RLM_SNAPSHOTS__EVERY_S",
        why="time between two comparisons of operations with their past",
        least=0.001,
    )
    performance_degradation_threshold: float = _key(
        0.2,
        sets="RLM_SNAPSHOTS__THRESHOLD",
        why="0.2: items that take 20 % longer than before",
        least=0.001,
    )

    def __new__(cls, *_: Any, **keys: Any) -> OptimizationConfig:
        """Refuse keys that do not exist before the record is made."""
        for name, value in keys.items():
            _refuse_unknown(cls, name, value)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a key.  Raises InvalidRequest for one that does not exist."""
        _refuse_unknown(type(self), name, value)
        object.__setattr__(self, name, value)

    def validate(self) -> list[str]:
        """Return a sentence for each mistake; none when the configuration can be used."""
        mistakes = [
            mistake
            for each in dataclasses.fields(self)
            if (mistake := _mistake(each, getattr(self, each.name)))
        ]
        return [*mistakes, *self._contradictions()]

    def _contradictions(self) -> Iterator[str]:
        if self.cache_compression is True and self.enable_cache_optimization is False:
            yield (
                "cache_compression=True: there is no cache to compress; set "
                "enable_cache_optimization=True, or leave it out"
            )
        if (
            self.enable_automatic_optimization is True
            and self.enable_performance_monitoring is False
        ):
            yield (
                "enable_automatic_optimization=True: it needs measurements; set "
                "enable_performance_monitoring=True, or leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as plain data."""
        return dataclasses.asdict(self)

    def export_config(self, format: str = "json") -> str:
        """Return all keys as JSON.  Raises InvalidRequest for another format than ``json``."""
        _refuse_format(format)
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def import_config(cls, text: str | bytes, format: str = "json") -> OptimizationConfig:
        """Return the configuration of a document; keys that it lacks keep their defaults.

        Raises InvalidSettings for other texts than a JSON object, and for unknown keys; `validate`
        checks the values.
        """
        _refuse_format(format)
        document = document_of(text)
        if unknown := [
            f"{name}={value!r}: {advice}"
            for name, value in document.items()
            if (advice := _unknown(cls, name))
        ]:
            raise InvalidSettings(unknown)
        return cls(**document)

    def as_environment(self) -> dict[str, str]:
        """Return the variables to start workers and clients with.

        Raises InvalidSettings with the sentences of `validate`.
        """
        return {variable: value for _, variable, value in self._settings()}

    def _settings(self) -> Iterator[tuple[str, str, str]]:
        """Yield key, variable and value; of two keys for one variable, the first with a value."""
        if issues := self.validate():
            raise InvalidSettings(issues)
        done: set[str] = set()
        for each in dataclasses.fields(self):
            variable = each.metadata["sets"]
            if (
                variable
                and variable not in done
                and (value := each.metadata["text"](getattr(self, each.name))) is not None
            ):
                done.add(variable)
                yield each.name, variable, value

    def effects(self) -> list[Effect]:
        """Return the effect of each key, in the order of the keys.

        Raises InvalidSettings with the sentences of `validate`.
        """
        sets = {key: f"{variable}={value}" for key, variable, value in self._settings()}
        return [
            Effect(
                each.name, getattr(self, each.name), sets.get(each.name, ""), each.metadata["why"]
            )
            for each in dataclasses.fields(self)
        ]


def _unknown(config: type[OptimizationConfig], name: str) -> str:
    """Return advice about a key that does not exist; '' for a known key."""
    known = [each.name for each in dataclasses.fields(config)]
    if name in known:
        return ""
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"there is no such key; did you mean {near[0]}?"
        if near
        else "there is no such key; docs/optimization.md lists all"
    )


def _refuse_unknown(config: type[OptimizationConfig], name: str, value: Any) -> None:
    if advice := _unknown(config, name):
        raise InvalidRequest(name, value, advice)


def _refuse_format(format: str) -> None:
    if format != "json":
        raise InvalidRequest("format", format, "must be json")


_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}


def _mistake(key: Field[Any], value: Any) -> str:
    """Return a sentence on an invalid value, with the valid ones; '' for a valid value."""
    name, _, optional = str(key.type).partition(" | ")
    types, kind = _KINDS[name]
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", key.metadata["least"]), ("at most", key.metadata["most"]))
        if math.isfinite(bound)
    ]
    if value is None and optional:
        return ""
    fits = isinstance(value, types) and (name == "bool" or not isinstance(value, bool))
    if (
        fits
        and (name == "bool" or key.metadata["least"] <= value <= key.metadata["most"])
        and value not in (math.inf, -math.inf)
    ):
        return ""
    none = ", or none" if optional else ""
    valid = f"{kind}{', ' if bounds else ''}{' and '.join(bounds)}{none}"
    return f"{key.name}={value!r}: must be {valid}; {key.default!r} is the default"
