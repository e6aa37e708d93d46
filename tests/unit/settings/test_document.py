"""Settings as a document: validation, export and import; secrets are never shown."""

from __future__ import annotations

import json
import os

import pytest

from rlm_tasks.errors import InvalidSettings
from rlm_tasks.settings.document import (
    as_environment,
    described,
    export_config,
    import_config,
    to_dict,
    validate,
)
from rlm_tasks.settings.model import Settings

# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        (
            {"RLM_LEDGER__LEASES_S": "3"},
            [
                (
                    "RLM_LEDGER__LEASES_S='3': there is no such setting; did you mean "
                    "RLM_LEDGER__LEASE_S?"
                )
            ],
        ),
        (
            {"RLM_OPERATION": "a"},
            ["RLM_OPERATION='a': there is no such setting; did you mean RLM_OPERATIONS?"],
        ),
        ({"RLM_REDIS_PORT": "6380"}, ["RLM_REDIS_PORT='6380': there is no such setting"]),
        (
            {"RLM_LLM__ENDPOINTS": '[{"name": "main", "api_key": "sk-1234567890"}]'},
            [
                (
                    "RLM_LLM__ENDPOINTS: 'api_key' is no field of it; its fields are name, "
                    "base_url, key_env, weight, models, max_tokens_as, health"
                )
            ],
        ),
        (
            {"RLM_LLM__ENDPOINTS": '[{"name": "main", "key_env": "sk-1234567890"}]'},
            [
                (
                    "RLM_LLM__ENDPOINTS__0__KEY_ENV=***: must be the name of a variable, in "
                    "capitals; that variable holds the key itself"
                )
            ],
        ),
        (
            {"RLM_ZZZ": "1"},
            ["RLM_ZZZ='1': there is no such setting; docs/configuration.md lists all; unset it"],
        ),
        (
            {"RLM_LOG_FORMAT": "jsn"},
            ["RLM_LOG_FORMAT='jsn': must be one of text, json; did you mean json?"],
        ),
        (
            {"RLM_NODE__TARGET_MS": "-4"},
            ["RLM_NODE__TARGET_MS='-4': Input should be greater than 0"],
        ),
        ({"RLM_PRESSURE__THRESHOLDS": "x"}, ["RLM_PRESSURE__THRESHOLDS='x': is not JSON"]),
        (
            {"RLM_PRESSURE__THRESHOLDS": "[5,4,3,2]"},
            ["RLM_PRESSURE: thresholds must rise, between 0 and 100"],
        ),
        (
            {"RLM_REDIS_URL": "localhost:6379"},
            ["RLM_REDIS_URL='localhost:6379': must start with redis://, rediss://, unix://"],
        ),
        (
            {"CIRCUIT_BREAKER_FAILURE_THRESHOLD": "x"},
            ["CIRCUIT_BREAKER_FAILURE_THRESHOLD='x': Input should be a valid integer"],
        ),
        (
            {"RLM_SLOTS": "x", "RLM_SLOT": "3"},
            ["RLM_SLOT='3': there is no such", "RLM_SLOTS='x': Input should be a valid integer"],
        ),
    ],
)
def test_each_mistake_is_reported_with_variable_value_and_advice(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], messages: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    found = validate(os.environ)

    assert [each[: len(words)] for each, words in zip(found, messages, strict=True)] == messages


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RLM_REDIS_URI", "redis://:geheim@host"),
        ("RLM_WEBHOOK_SECRET", "geheim"),
        ("RLM_REDIS_URL", "http://me:geheim@host"),
    ],
)
def test_a_mistake_is_reported_without_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    [messages] = validate(os.environ)

    assert name in messages
    assert "geheim" not in messages


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RLM_NODE__TIMEOUT_MULTIPLIERS__PARSE", "2"),
        ("RLM_NODE", '{"target_ms": 5}'),
        ("RELMS", "1"),
        ("RLM_WORKER_SERVICE_HOST", "10.0.0.1"),
        ("RLM_WORKER_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("RLM_WORKER_PORT", "tcp://10.0.0.1:8000"),
    ],
)
def test_every_form_of_a_variable_is_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    assert validate(os.environ) == []


# --- as a document ----------------------------------------------------------------------------


SECRETIVE = {
    "redis_url": "redis://:geheim@host/1",
    "api_key": "geheim",
    "operations": "shop.operations,shop.more",
    "node": {"target_ms": 5, "timeout_multipliers": {"parse": 2.0}},
    "alerts": {
        "webhook_url": "https://hooks/geheim",
        "webhook_secret": "geheim",
        "channels": ("log", "webhook"),
    },
    "autoscale": {"webhook_url": "https://hooks/geheim"},
}


def test_a_document_has_everything_but_secrets() -> None:
    document = to_dict(Settings(**SECRETIVE))

    assert "geheim" not in json.dumps(document)
    assert (document["redis_url"], document["alerts"]["webhook_secret"]) == (
        "redis://:***@host/1",
        "***",
    )
    assert (document["api_key"], to_dict(Settings())["api_key"]) == ("***", "")
    assert "geheim" not in f"{Settings(api_key='geheim')!r} {Settings(api_key='geheim').api_key}"
    assert (document["operations"], document["node"]["target_ms"]) == (
        ["shop.operations", "shop.more"],
        5.0,
    )
    assert set(document) == set(Settings.model_fields)


def test_an_export_can_be_imported_and_keeps_the_secrets_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = export_config(Settings(**SECRETIVE))
    assert "geheim" not in text
    assert "***" not in text

    monkeypatch.setenv("RLM_REDIS_URL", "redis://:another@host/2")
    monkeypatch.setenv("RLM_ALERTS__WEBHOOK_SECRET", "another")
    monkeypatch.setenv("RLM_API_KEY", "another\n")
    settings = import_config(text)

    assert settings.operations == ("shop.operations", "shop.more")
    assert settings.node.timeout_multipliers == {"parse": 2.0}
    assert settings.alerts.channels == ("log", "webhook")
    assert (settings.redis_url, settings.alerts.webhook_secret) == (
        "redis://:another@host/2",
        "another",
    )
    assert settings.api_key.get_secret_value() == "another"


def test_settings_as_variables_give_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**{**SECRETIVE, "redis_url": "redis://host/1"})
    variables = as_environment(settings)
    assert "geheim" not in json.dumps(variables)

    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert validate(os.environ) == []
    again = Settings()
    assert to_dict(again)["node"] == to_dict(settings)["node"]
    assert (again.operations, again.redis_url, again.alerts.channels) == (
        settings.operations,
        settings.redis_url,
        ("log", "webhook"),
    )


def test_endpoints_and_prices_of_models_are_exported_and_imported() -> None:
    llm = {
        "endpoints": [{"name": "main", "base_url": "http://models/v1", "models": {"m": "m-1"}}],
        "models": {"m": {"input_price": 0.5}},
    }
    settings = Settings(llm=llm)

    assert import_config(export_config(settings)).llm == settings.llm
    [shown] = [each for each in described(settings) if each.variable == "RLM_LLM__ENDPOINTS"]
    assert json.loads(json.dumps(shown.value))[0]["models"] == {"m": "m-1"}
    variables = as_environment(settings)
    assert json.loads(variables["RLM_LLM__ENDPOINTS"])[0]["base_url"] == "http://models/v1"
    assert json.loads(variables["RLM_LLM__MODELS"])["m"]["input_price"] == 0.5


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("{", "the configuration is not JSON"),
        ("[]", "the configuration is list; it must be a JSON object"),
        (
            '{"node": {"target": 3}}',
            "RLM_NODE__TARGET='3': there is no such setting; did you mean RLM_NODE__TARGET_MS?",
        ),
        ('{"node": {"target_ms": "x"}}', "RLM_NODE__TARGET_MS='x': Input should be a valid number"),
        (
            '{"log_format": "jso"}',
            "RLM_LOG_FORMAT='jso': must be one of text, json; did you mean json?",
        ),
    ],
)
def test_a_wrong_document_is_refused_with_the_same_messages(text: str, messages: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        import_config(text)

    assert str(raised.value).startswith(messages)
