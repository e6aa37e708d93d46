"""Plans: the cost of a job is predicted before it runs, and compared with the real cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from resilience.bucket import TokenBucket
from rlm_tasks.client.client import Client
from rlm_tasks.client.planning import Plan
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.llm.endpoint_pool import rates
from rlm_tasks.testing import embedded, fake_provider
from scheduler.slots import SlotBoard
from tests.integration.conftest import client_of, environment_of
from tests.integration.llm_ops import Animal
from tests.integration.test_cli import rlm
from tests.support import wait_until

SLOTS = 2


class Platform:
    """A provider, a worker, its client, and the environment of both."""

    def __init__(
        self, client: Client, provider: fake_provider.Running, environment: dict[str, str]
    ) -> None:
        self.client, self.provider, self.environment = client, provider, environment

    def spent(self) -> tuple[int, int]:
        """Return the calls and tokens that the provider has counted."""
        counts = self.provider.report()
        return counts["answered"], counts["prompt_tokens"] + counts["completion_tokens"]


@pytest.fixture(scope="module")
def platform(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    with ExitStack() as stack:
        provider = stack.enter_context(fake_provider.running(latency=0.05))
        environment = environment_of(
            server.url,
            "plan",
            OPENAI_API_KEY="sk-none",
            OPENAI_BASE_URL=provider.base_url,
            RLM_LLM__TOKENS="10000000",
        )
        client = stack.enter_context(client_of(environment))
        log = tmp_path_factory.mktemp("plan") / "worker.log"
        stack.enter_context(embedded.worker(environment, log=log, slots=SLOTS))
        wait_until(lambda: client.plan(operation="nap", items=[1]).slots == SLOTS)
        yield Platform(client, provider, environment)


def merged(n: int) -> dict[str, Any]:
    """Return a request with n items whose answers are merged."""
    items = [
        f"item {at} of {n} speaks of {at % 7} things, and {'of many more, ' * (at % 5)}then it ends"
        for at in range(n)
    ]
    params = {"prompt": "Describe this text.\n{item}", "fanIn": 5, "maxTokens": 400}
    return {"operation": "llm.map_reduce", "items": items, "params": params}


def test_a_plan_predicts_calls_exactly_and_tokens_within_a_tenth(platform: Platform) -> None:
    """The tokens are within a tenth from the second job on."""
    blind = platform.client.plan(merged(60))

    assert (blind.based_on, blind.slots) == (0, SLOTS)
    assert "gpt-4.1-mini" in blind.notes[0]
    assert blind.time_s is not None
    assert platform.spent() == (0, 0)
    platform.client.execute(merged(60), timeout=60)
    calls, tokens = platform.spent()
    assert blind.calls.p50 == blind.calls.p90 == calls == 60 + 12 + 3 + 1
    assert blind.tokens.p90 >= tokens

    platform.provider.reset()
    learned = platform.client.plan(merged(100))
    result = platform.client.execute(merged(100), timeout=60)
    calls, tokens = platform.spent()

    assert (learned.based_on, learned.notes) == (76, ())
    assert learned.calls.p50 == calls == 100 + 20 + 4 + 1
    assert learned.tokens.p50 == pytest.approx(tokens, rel=0.1)
    assert learned.tokens.p50 < learned.tokens.p90
    assert learned.time_s is not None
    took_s = result.metrics.execution_time_ms / 1000
    print(f"\n{learned}\nspent: {tokens:,} tokens, took {took_s:.2f} s")


def test_a_plan_of_a_question_covers_its_calls_and_tokens(platform: Platform) -> None:
    items = [
        f"Passage {at}: the {'lighthouse' if at % 40 == 0 else 'garden'} was built in {1800 + at}."
        for at in range(400)
    ]
    request = {
        "operation": "llm.ask",
        "items": items,
        "params": {"question": "When was the lighthouse built?", "groupTokens": 600},
    }
    platform.provider.reset()

    planned = platform.client.plan(request)
    platform.client.execute(request, timeout=60)

    calls, tokens = platform.spent()
    assert (planned.rounds[0].operation, planned.rounds[-1].operation) == ("llm.ask", "llm.answer")
    assert planned.rounds[0].calls.p50 <= calls <= planned.calls.p90
    assert tokens <= planned.tokens.p90 * 1.1
    print(f"\n{planned}\nspent: {calls} calls, {tokens:,} tokens")


def test_a_plan_leaves_nothing_behind(client_without_worker: Client) -> None:
    redis = client_without_worker.ledger.store.client
    mine = f"{client_without_worker.settings.namespace}:*"

    planned = client_without_worker.plan(merged(1000))

    assert (planned.time_s, planned.limited_by, planned.calls.p50) == (
        None,
        "no worker",
        1000 + 200 + 40 + 8 + 2 + 1,
    )
    assert list(redis.scan_iter(mine)) == []


def test_a_plan_includes_recent_use_of_limits_and_the_pressure_level(
    server: embedded.Server,
) -> None:
    with client_of(environment_of(server.url, "plan-pressed", pressed=True)) as client:
        board = SlotBoard(client.ledger.store, client.ledger.keys)
        limit = rates(client.settings.llm, "gpt-4.1-mini")["tokens"]

        def planned() -> Plan:
            client.ledger.store.call(board.publish("a worker", 2, 2, ["plan-pressed.normal"]))
            return client.plan(merged(1000))

        calm = planned()
        TokenBucket("llm:OPENAI_API_KEY:gpt-4.1-mini", client.store, tokens=limit).acquire(
            tokens=15_000
        )
        used = planned()
        client.pressure.force("critical", for_s=60)
        pressed = planned()

    assert calm.time_s is not None
    assert used.time_s is not None
    # 15,000 tokens of 90,000 a minute are 10 s, less the refill meanwhile.
    assert 0 < used.time_s.p50 - calm.time_s.p50 <= 10.1
    assert (used.limited_by, used.models) == ("tokens", {"medium": "gpt-4.1-mini"})
    assert (pressed.level, pressed.models) == ("critical", {"medium": "gpt-4.1-nano"})
    assert pressed.money.p50 < used.money.p50


def test_plan_and_submit_refuse_with_the_same_message(
    client_without_worker: Client,
) -> None:
    for request in (
        {"operation": "llm.map", "items": [1], "params": {"prompt": "Say it", "max_tokens": 10**6}},
        {"operation": "llm.ask", "items": "a text", "params": {"question": "Who?"}},
        {"operation": "echo", "items": [1], "budget": {"calls": 3}},
        {"operation": "nothing", "items": [1]},
    ):
        with pytest.raises(InvalidRequest) as planned:
            client_without_worker.plan(request)
        with pytest.raises(InvalidRequest) as submitted:
            client_without_worker.submit(request)
        assert str(planned.value) == str(submitted.value)
    with pytest.raises(InvalidRequest, match="would use up an iterator"):
        client_without_worker.plan(
            operation="llm.map", items=iter("abc"), params={"prompt": "Say it"}
        )


def test_plans_are_close_after_a_hundred_calls_also_for_forms_and_other_tokenizers(
    server: embedded.Server, tmp_path: Path
) -> None:
    """A provider that counts as real models do, and answers whose lengths vary."""
    template = "in about 20 words: {item}"
    sum_up = {"prompt": f"Sum this up {template}", "max_tokens": 100}
    requests: list[dict[str, Any]] = [
        {"operation": "llm.map", "params": sum_up},
        {"operation": "llm.map", "params": {**sum_up, "output": Animal}},
        {"operation": "llm.map_reduce", "params": {**sum_up, "fan_in": 10}},
    ]
    with ExitStack() as stack:
        provider = stack.enter_context(
            fake_provider.running(tokenizer="pieces", model_behaviour="writer")
        )
        environment = environment_of(
            server.url,
            "plans",
            RLM_OPERATIONS="tests.integration.llm_ops",
            OPENAI_API_KEY="sk-none",
            OPENAI_BASE_URL=provider.base_url,
            RLM_LLM__TOKENS="10000000",
        )
        client = stack.enter_context(client_of(environment))
        stack.enter_context(embedded.worker(environment, log=tmp_path / "worker.log", slots=SLOTS))

        def items(kind: str, count: int) -> list[str]:
            words = "return the number of items, or -1 (see `len`): " * 9
            return [f"{kind} {at}: {words[: 20 + 300 * at // count]}" for at in range(count)]

        for request in requests:
            client.execute({**request, "items": items("first", 100)}, timeout=60)
            planned = client.plan({**request, "items": items("next", 40)})
            result = client.execute({**request, "items": items("next", 40)}, timeout=60)

            assert result.spent is not None
            spent = result.spent.spent
            assert planned.alike >= 10
            assert planned.calls.p50 == pytest.approx(spent["calls"], rel=0.25)
            assert planned.tokens.p50 == pytest.approx(spent["tokens"], rel=0.25)
            assert spent["tokens"] <= planned.tokens.p90
            assert "with these params" in str(planned)


def test_progress_moves_as_answers_arrive_also_with_a_budget(platform: Platform) -> None:
    """The answer to the first item is late; those behind it count as soon as they arrive."""
    platform.provider.reset()
    platform.provider.schedule({"kind": "slow", "to": 1, "seconds": 1.5})
    items = [f"{at} comes in time" for at in range(40)]
    try:
        job = platform.client.submit(
            operation="llm.map",
            items=items,
            params={"prompt": "Say {item}"},
            type="sequential",
            budget={"calls": 100},
        )
        wait_until(lambda: job.progress().done >= 30)
        assert platform.provider.report()["in_flight"] >= 1, "the first answer is not there yet"
        assert not job.status.final
        assert job.get(timeout=30) == [f"Say {item}" for item in items]
    finally:
        platform.provider.schedule()


def test_a_plan_without_models_knows_the_time_after_the_first_run(platform: Platform) -> None:
    request = {"operation": "nap", "items": [10] * 40}

    before = platform.client.plan(request)
    platform.client.execute(request, timeout=60)
    after = platform.client.plan(request)

    assert (before.time_s, before.based_on) == (None, 0)
    assert "nap" in before.notes[0]
    assert after.time_s is not None
    assert after.time_s.p90 > after.time_s.p50 >= 0.2
    assert (after.limited_by, after.based_on, after.calls.p90) == ("slots", 40, 0)


def test_the_command_line_prints_a_plan_as_a_table_or_json(platform: Platform) -> None:
    request = json.dumps({**merged(12), "budget": {"calls": 8}})

    table = rlm(platform.environment, "plan", stdin=request)
    as_json = rlm(platform.environment, "plan", "--json", stdin=request)

    assert table.returncode == 0, table.stderr
    assert [line.split()[1] for line in table.stdout.splitlines() if "llm.merge" in line] == [
        "llm.merge"
    ] * 2
    assert "its calls pay for this share of the items: 53%" in table.stdout
    assert json.loads(as_json.stdout)["calls"] == {"p50": 12 + 3 + 1, "p90": 12 + 3 + 1}
