"""The metrics of calls to models."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from msgspec.structs import replace

from resilience.errors import CallTimeout, Category, RateLimited
from rlm_tasks.llm import metrics
from rlm_tasks.llm.endpoint_pool import NOTHING, Bill
from rlm_tasks.llm.wire.answers import Answer
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, UnusableAnswer
from rlm_tasks.llm.wire.rate_limit_headers import LimitState, RateLimitHeaders
from rlm_tasks.metrics import slot_files
from rlm_tasks.telemetry import exposition


def test_calls_are_counted_by_outcome_and_answers_by_tokens_time_and_money(tmp_path: Path) -> None:
    unsaid = LimitState()
    answer = Answer("some", "four", "stop", RateLimitHeaders(unsaid, unsaid), 0.3)
    ends: dict[str, BaseException | None] = {
        "rate_limited": RateLimited("endpoint", 1.0, "429"),
        "timeout": CallTimeout("endpoint", 60.0),
        "failed": ProviderDown("main", "away"),
        "refused": ProviderRefused("main", Category.AUTH, "UNAUTHORISED", "no"),
        "unusable": UnusableAnswer("main", "empty"),
    }
    slot_files.begin(tmp_path)
    try:
        count = functools.partial(metrics.count_end, model="small", endpoint="main")
        count(answer=answer, error=None, bill=Bill(30, 20, {"money": 0.5}))
        for error in (*ends.values(), asyncio.CancelledError()):
            count(answer=None, error=error, bill=NOTHING)
        count(answer=replace(answer, text="", fault="REFUSED"), error=None, bill=NOTHING)
        registry = exposition.registry(
            tmp_path, lambda: exposition.WorkerState(1, 0, False, 0, 1.0)
        )

        def counted(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"model": "small", **labels})

        calls = {
            end: counted("rlm_llm_calls_total", endpoint="main", outcome=end)
            for end in ("ok", "no_text", *ends)
        }
        assert calls == {"ok": 1, "no_text": 1, **dict.fromkeys(ends, 1), "failed": 2}
        assert (counted("rlm_llm_call_seconds_count"), counted("rlm_llm_call_seconds_sum")) == (
            2,
            0.6,
        )
        assert [
            counted("rlm_llm_tokens_total", kind=kind) for kind in ("prompt", "completion")
        ] == [30, 20]
        assert counted("rlm_llm_money_total") == 0.5
    finally:
        slot_files.end()
