"""The settings of a process: wrong values, and the exporters of traces."""

from __future__ import annotations

import pytest

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.settings.environment import settings, traces_exporters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RLM_NAMESPACE", "no spaces"),
        ("RLM_LEDGER__LEASE_S", "0"),
        ("RLM_MAX_RESULT_BYTES", "many"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    settings.cache_clear()

    with pytest.raises(InvalidRequest, match=f"{name}='{value}'"):
        settings()


def test_a_wrong_nested_value_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_NODE__TIMEOUT_MULTIPLIERS", '{"parse": 0}')
    settings.cache_clear()

    with pytest.raises(
        InvalidRequest,
        match="RLM_NODE__TIMEOUT_MULTIPLIERS__PARSE=0: Input should be greater than 0",
    ):
        settings()
    settings.cache_clear()


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ["otlp_proto_http"]),
        (
            {"OTEL_TRACES_EXPORTER": "console, otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            ["console", "otlp_proto_grpc"],
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            ["otlp_proto_http"],
        ),
        ({"OTEL_TRACES_EXPORTER": "none"}, []),
    ],
)
def test_exporters_come_from_the_standard_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], names: list[str]
) -> None:
    for name in (
        "OTEL_TRACES_EXPORTER",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert traces_exporters() == names
