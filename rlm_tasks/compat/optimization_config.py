"""The 28 keys of source document 2, and what each of them sets on this platform.

Decides what a key stands for, and says so of those that stand for nothing.  A configuration is a
record that may hold anything: what is wrong with it is told when it is asked, and what it sets
holds in workers that are started with its variables.  Refuses to change a running process, and to
know what a setting is used for."""

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

_POOL = "pool processes are what is reused here, and nothing is allocated for each step that a pool of objects could save"
_UNSAID = "of breakers that say nothing else"
_BATCHED = "spans always leave a worker in batches"

Told = Callable[[Any], str | None]


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
    told: Told = _json,
    why: str = "",
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """Declare a key: the variable it `sets` and how a value is `told` there, or `why` it sets none;
    and its bounds.
    """
    return field(
        default=default,
        metadata={"sets": sets, "told": told, "why": why, "least": least, "most": most},
    )


@dataclass(frozen=True, slots=True)
class Effect:
    """What one key comes to."""

    key: str
    value: Any
    sets: str  # VARIABLE=value; '' when it sets nothing
    why: str  # the reason when it sets nothing, or what stands beside it


@dataclass(kw_only=True)
class OptimizationConfig:
    """The keys of source document 2, with its defaults; attributes may be changed.

    Raises InvalidRequest, naming the nearest, for a key that does not exist.  Values are not looked
    at before `validate`."""

    enable_object_pool: bool = _key(True, why=_POOL)
    object_pool_max_size: int = _key(50, why=_POOL, least=1)
    object_pool_cleanup_threshold: float = _key(0.9, why=_POOL, least=0, most=1)
    enable_context_optimization: bool = _key(
        True, why="an item's context is made of its node's: none is copied or merged"
    )
    enable_memory_optimization: bool = _key(
        True, sets="RLM_PRESSURE__ENABLED", why="pressure of memory, and of CPU with it"
    )
    enable_step_optimization: bool = _key(
        True, why="an operation is analysed once, when it is declared"
    )
    enable_algorithm_optimization: bool = _key(
        True, why="packing is always the fast one: MessagePack, compressed if it pays"
    )
    enable_concurrency_optimization: bool = _key(
        True,
        sets="RLM_AUTOSCALE__ENABLED",
        why="for pools that are started with `--autoscale`, and for batches",
    )
    max_concurrent_executions: int | None = _key(
        None,
        sets="RLM_SLOTS",
        told=_or_zero,
        why="of each worker; 0: as many as it has CPUs",
        least=1,
    )
    enable_optimized_telemetry: bool = _key(
        True, why=f"{_BATCHED}; `RLM_TRACING__ENABLED` says whether there are any"
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
        told=_milliseconds,
        why="OpenTelemetry's own variable, in ms",
        least=0.001,
    )
    enable_optimized_error_handling: bool = _key(
        True,
        sets="RLM_FAULT_PATTERNS",
        told=_zero_when_off,
        why="on: as many faults are kept as `error_cache_size` says",
    )
    enable_circuit_breaker: bool = _key(True, sets="RLM_BREAKERS__ENABLED", why="of every breaker")
    error_cache_size: int = _key(
        50,
        sets="RLM_FAULT_PATTERNS",
        why="0 while `enable_optimized_error_handling` is off",
        least=1,
    )
    circuit_breaker_failure_threshold: int = _key(
        10, sets="RLM_BREAKERS__FAILURE_THRESHOLD", why=_UNSAID, least=1
    )
    circuit_breaker_recovery_timeout_seconds: float = _key(
        60, sets="RLM_BREAKERS__RECOVERY_TIMEOUT_S", why=_UNSAID, least=0.001
    )
    enable_cache_optimization: bool = _key(False, why=_CACHE)
    cache_compression: bool = _key(False, why=_CACHE)
    cache_ttl_seconds: float = _key(7200, why=_CACHE, least=0.001)
    cache_max_size: int = _key(500, why=_CACHE, least=1)
    slow_execution_threshold_ms: float = _key(
        1000.0, sets="RLM_ALERTS__SLOW_EXECUTION_MS", why="of one item", least=0.001
    )
    memory_pressure_threshold_mb: float = _key(
        500.0, sets="RLM_ALERTS__MEMORY_MB", why="of one pool process", least=0.001
    )
    cpu_usage_threshold_percent: float = _key(
        80.0,
        sets="RLM_ALERTS__CPU_PCT",
        why="of a host: it is told, nothing is left out for it",
        least=0.001,
        most=100,
    )
    enable_automatic_optimization: bool = _key(
        False, why="nothing here changes a setting by itself"
    )
    optimization_analysis_interval_seconds: float = _key(
        60.0,
        sets="RLM_SNAPSHOTS__EVERY_S",
        why="how often operations are compared with their past",
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
        """Return what is wrong, a sentence for each mistake; none when it can be used."""
        wrong = [
            issue
            for each in dataclasses.fields(self)
            if (issue := _wrong(each, getattr(self, each.name)))
        ]
        return [*wrong, *self._contradictions()]

    def _contradictions(self) -> Iterator[str]:
        if self.cache_compression is True and self.enable_cache_optimization is False:
            yield "cache_compression=True: there is no cache to compress; set enable_cache_optimization=True, or leave it out"
        if (
            self.enable_automatic_optimization is True
            and self.enable_performance_monitoring is False
        ):
            yield (
                "enable_automatic_optimization=True: nothing is measured to go by; set enable_performance_monitoring=True, "
                "or leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as plain data."""
        return dataclasses.asdict(self)

    def export_config(self, format: str = "json") -> str:
        """Return all keys as a document.  Raises InvalidRequest for another format than
        ``json``.
        """
        _refuse_format(format)
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def import_config(cls, text: str | bytes, format: str = "json") -> OptimizationConfig:
        """Return what a document says; keys that it leaves out are at their defaults.

        Raises InvalidSettings for what is no JSON object or has unknown keys; wrong values are told
        by `validate`."""
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
        """Return the variables that make workers and clients behave so.  Raises InvalidSettings
        with what `validate` tells.
        """
        return {variable: value for _, variable, value in self._settings()}

    def _settings(self) -> Iterator[tuple[str, str, str]]:
        """Yield key, variable and value; of two keys of one variable the first that says
        something.
        """
        if issues := self.validate():
            raise InvalidSettings(issues)
        said: set[str] = set()
        for each in dataclasses.fields(self):
            variable = each.metadata["sets"]
            if (
                variable
                and variable not in said
                and (value := each.metadata["told"](getattr(self, each.name))) is not None
            ):
                said.add(variable)
                yield each.name, variable, value

    def effects(self) -> list[Effect]:
        """Return what each key sets, or why it sets nothing, in the order of the document.

        Raises InvalidSettings with what `validate` tells.
        """
        sets = {key: f"{variable}={value}" for key, variable, value in self._settings()}
        return [
            Effect(
                each.name, getattr(self, each.name), sets.get(each.name, ""), each.metadata["why"]
            )
            for each in dataclasses.fields(self)
        ]


def _unknown(config: type[OptimizationConfig], name: str) -> str:
    """Return what to do about a key that does not exist, '' when it does."""
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


def _wrong(key: Field[Any], value: Any) -> str:
    """Return what is wrong with one value and what would do, '' when nothing is."""
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
    return f"{key.name}={value!r}: must be {kind}{', ' if bounds else ''}{' and '.join(bounds)}{none}; {key.default!r} is the default"
