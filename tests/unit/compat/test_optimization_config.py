"""OptimizationConfig: the defaults of its 28 keys, their mistakes, export and import, and their
effects.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from resilience.breaker_storage import configured
from resilience.settings import store_settings
from rlm_tasks import OptimizationConfig
from rlm_tasks.celery import configuration
from rlm_tasks.errors import InvalidRequest, InvalidSettings
from rlm_tasks.settings.document import fields, validate, variable
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry.spans import Export, HandOver, Ids, Spans
from tests.support import wait_until

DEFAULTS = {
    "enable_object_pool": True,
    "object_pool_max_size": 50,
    "object_pool_cleanup_threshold": 0.9,
    "enable_context_optimization": True,
    "enable_memory_optimization": True,
    "enable_step_optimization": True,
    "enable_algorithm_optimization": True,
    "enable_concurrency_optimization": True,
    "max_concurrent_executions": None,
    "enable_optimized_telemetry": True,
    "enable_performance_monitoring": True,
    "telemetry_batch_size": 10,
    "telemetry_flush_interval_seconds": 30.0,
    "enable_optimized_error_handling": True,
    "enable_circuit_breaker": True,
    "error_cache_size": 50,
    "circuit_breaker_failure_threshold": 10,
    "circuit_breaker_recovery_timeout_seconds": 60,
    "enable_cache_optimization": False,
    "cache_compression": False,
    "cache_ttl_seconds": 7200,
    "cache_max_size": 500,
    "slow_execution_threshold_ms": 1000.0,
    "memory_pressure_threshold_mb": 500.0,
    "cpu_usage_threshold_percent": 80.0,
    "enable_automatic_optimization": False,
    "optimization_analysis_interval_seconds": 60.0,
    "performance_degradation_threshold": 0.2,
}


def test_the_keys_and_their_defaults() -> None:
    assert OptimizationConfig().to_dict() == DEFAULTS
    assert (len(DEFAULTS), sum(name.startswith("enable_") for name in DEFAULTS)) == (28, 12)
    assert OptimizationConfig().validate() == []


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda keys: OptimizationConfig(**keys),
        lambda keys: setattr(OptimizationConfig(), *next(iter(keys.items()))),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(change: Any) -> None:
    with pytest.raises(
        InvalidRequest,
        match="enable_objectpool=False: there is no such key; did you mean enable_object_pool",
    ):
        change({"enable_objectpool": False})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"enable_object_pool": 1},
            "enable_object_pool=1: must be true or false; True is the default",
        ),
        (
            {"object_pool_max_size": True},
            "object_pool_max_size=True: must be a whole number, at least 1; 50 is the default",
        ),
        ({"object_pool_max_size": 1.5}, "object_pool_max_size=1.5: must be a whole number"),
        (
            {"object_pool_cleanup_threshold": 1.1},
            "object_pool_cleanup_threshold=1.1: must be a number, at least 0 and at most 1",
        ),
        (
            {"max_concurrent_executions": 0},
            "max_concurrent_executions=0: must be a whole number, at least 1, or none",
        ),
        (
            {"telemetry_batch_size": 2049},
            "telemetry_batch_size=2049: must be a whole number, at least 1 and at most 2048",
        ),
        (
            {"telemetry_flush_interval_seconds": "30"},
            "telemetry_flush_interval_seconds='30': must be a number",
        ),
        (
            {"circuit_breaker_failure_threshold": 0},
            "circuit_breaker_failure_threshold=0: must be a whole number, at least 1",
        ),
        ({"cache_ttl_seconds": math.nan}, "cache_ttl_seconds=nan: must be a number"),
        (
            {"slow_execution_threshold_ms": math.inf},
            "slow_execution_threshold_ms=inf: must be a number",
        ),
        ({"cpu_usage_threshold_percent": 101}, "cpu_usage_threshold_percent=101: must be a number"),
        (
            {"performance_degradation_threshold": None},
            "performance_degradation_threshold=None: must be a number",
        ),
        (
            {"cache_compression": True},
            (
                "cache_compression=True: there is no cache to compress; set "
                "enable_cache_optimization=True"
            ),
        ),
        (
            {"enable_automatic_optimization": True, "enable_performance_monitoring": False},
            (
                "enable_automatic_optimization=True: it needs measurements; set "
                "enable_performance_monitoring=True"
            ),
        ),
    ],
)
def test_mistakes_are_reported_by_validate_and_not_before(
    keys: dict[str, Any], message: str
) -> None:
    config = OptimizationConfig(**keys)

    [issue] = config.validate()
    assert issue.startswith(message)
    for refused in (config.as_environment, config.effects):
        with pytest.raises(InvalidSettings) as raised:
            refused()
        assert raised.value.issues == [issue]


def test_all_mistakes_are_reported_at_once() -> None:
    config = OptimizationConfig(error_cache_size=-1, cache_max_size=0)

    assert [each.partition("=")[0] for each in config.validate()] == [
        "error_cache_size",
        "cache_max_size",
    ]
    config.error_cache_size = 20
    config.cache_max_size = 100
    assert config.validate() == []


# --- as a document ----------------------------------------------------------------------------


def test_an_export_can_be_imported_unchanged() -> None:
    config = OptimizationConfig(
        max_concurrent_executions=7, telemetry_flush_interval_seconds=0.1, error_cache_size=-3
    )

    again = OptimizationConfig.import_config(config.export_config(format="json"), format="json")

    assert again == config
    assert list(again.to_dict()) == list(DEFAULTS)
    assert again.validate() == config.validate() != []


def test_a_document_may_omit_keys() -> None:
    assert OptimizationConfig.import_config('{"cache_max_size": 9}') == OptimizationConfig(
        cache_max_size=9
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the configuration is not JSON"),
        ("[1]", "the configuration is list; it must be a JSON object"),
        (
            '{"cache_size": 1, "zz": 2}',
            (
                "cache_size=1: there is no such key; did you mean cache_max_size?\nzz=2: there is "
                "no such key"
            ),
        ),
    ],
)
def test_a_wrong_document_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        OptimizationConfig.import_config(text)

    assert str(raised.value).startswith(message)


def test_json_is_the_only_format() -> None:
    for act in (
        OptimizationConfig().export_config,
        lambda format: OptimizationConfig.import_config("{}", format),
    ):
        with pytest.raises(InvalidRequest, match="format='yaml': must be json"):
            act(format="yaml")


# --- effects ----------------------------------------------------------------------------------


def environment_of(monkeypatch: pytest.MonkeyPatch, config: OptimizationConfig) -> Settings:
    """Return the settings of a process that is started with the variables of a configuration."""
    for name, value in config.as_environment().items():
        monkeypatch.setenv(name, value)
    assert validate(os.environ) == []
    store_settings.cache_clear()
    return Settings()


@pytest.fixture(autouse=True)
def _own_store_settings() -> Any:
    yield
    store_settings.cache_clear()


def test_the_keys_set_the_settings_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizationConfig(
        max_concurrent_executions=7,
        enable_memory_optimization=False,
        enable_concurrency_optimization=False,
        enable_performance_monitoring=False,
        error_cache_size=20,
        circuit_breaker_failure_threshold=3,
        circuit_breaker_recovery_timeout_seconds=30,
        enable_circuit_breaker=False,
        slow_execution_threshold_ms=5.5,
        memory_pressure_threshold_mb=200,
        cpu_usage_threshold_percent=70,
        optimization_analysis_interval_seconds=10,
        performance_degradation_threshold=0.5,
        telemetry_batch_size=5,
        telemetry_flush_interval_seconds=10.0,
    )

    settings = environment_of(monkeypatch, config)

    assert configuration(settings)["worker_concurrency"] == 7
    assert [
        each.enabled
        for each in (settings.pressure, settings.autoscale, settings.snapshots, settings.breakers)
    ] == [False] * 4
    assert settings.fault_patterns == 20
    breaker = configured()
    assert (breaker.failure_threshold, breaker.recovery_timeout_s) == (3, 30)
    assert configured("executor").failure_threshold == 10, "a preset with another value keeps it"
    assert (
        settings.alerts.slow_execution_ms,
        settings.alerts.memory_mb,
        settings.alerts.cpu_pct,
    ) == (5.5, 200, 70)
    assert (settings.snapshots.every_s, settings.snapshots.threshold) == (10, 0.5)
    assert (
        os.environ["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"],
        os.environ["OTEL_BSP_SCHEDULE_DELAY"],
    ) == ("5", "10000")


def test_a_worker_can_start_with_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = environment_of(monkeypatch, OptimizationConfig())

    assert "worker_concurrency" not in configuration(settings), "the number of CPUs"
    assert (settings.alerts.slow_execution_ms, settings.breakers.failure_threshold) == (1000, 10)


class Batches(SpanExporter):
    """An exporter that counts the spans of each batch."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.sizes.append(len(spans))
        return SpanExportResult.SUCCESS


def test_spans_are_exported_in_batches_and_the_rest_when_the_worker_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment_of(monkeypatch, OptimizationConfig())
    batches = Batches()
    export = Export([batches])
    spans = Spans([HandOver(export.sender)])
    export.start()
    ended = 0

    def end_one() -> int:
        nonlocal ended
        span = spans.start("node", Ids(ended + 1, ended + 1, 0, True), 1, {})
        assert span is not None
        span.end()
        ended += 1
        return ended

    def one_has_left() -> bool:
        if not batches.sizes:
            end_one()  # the SDK may miss a wake-up while it is awake, so it gets another
        return bool(batches.sizes)

    while end_one() < 25:
        pass
    wait_until(one_has_left)
    export.stop()
    assert set(batches.sizes[:-1]) == {10}
    assert 0 < batches.sizes[-1] <= 10
    assert sum(batches.sizes) == ended


def test_without_error_handling_no_fault_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizationConfig(enable_optimized_error_handling=False, error_cache_size=20)

    assert environment_of(monkeypatch, config).fault_patterns == 0
    settings_of = {each.key: each.sets for each in config.effects()}
    assert (settings_of["enable_optimized_error_handling"], settings_of["error_cache_size"]) == (
        "RLM_FAULT_PATTERNS=0",
        "",
    )


def test_each_key_has_its_setting_or_the_reason_why_it_has_none() -> None:
    known = {variable(place) for place, _ in fields()}
    effects = OptimizationConfig().effects()

    assert [(each.key, each.value) for each in effects] == list(DEFAULTS.items())
    assert {each.key for each in effects if not each.sets and not each.why} == set()
    set_here = {each.sets.partition("=")[0] for each in effects if each.sets}
    assert {each for each in set_here if not each.startswith("OTEL_BSP_")} <= known
    assert sum(bool(each.sets) for each in effects) == 15
    assert (
        dict(each.sets.split("=") for each in effects if each.sets)
        == OptimizationConfig().as_environment()
    )


def test_the_page_has_a_row_for_each_key() -> None:
    page = (Path(__file__).parents[3] / "docs" / "optimization.md").read_text(encoding="utf-8")

    assert page_rows() in page, "\n" + page_rows()


def page_rows() -> str:
    """Return the table of docs/optimization.md."""
    return "\n".join(
        (
            f"| `{each.key}` | `{json.dumps(each.value)}` | "
            f"{f'`{each.sets}`' if each.sets else 'nothing'} | {each.why} |"
        )
        for each in OptimizationConfig().effects()
    )


def test_importing_the_package_does_not_import_it() -> None:
    code = (
        "import rlm_tasks, sys; assert 'rlm_tasks.compat.optimization_config' not in sys.modules; "
        "rlm_tasks.OptimizationConfig()"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_it_is_a_dataclass() -> None:
    config = OptimizationConfig(cache_max_size=3)

    assert dataclasses.replace(config, cache_max_size=4) == OptimizationConfig(cache_max_size=4)
    assert config != OptimizationConfig()
