"""Metrics of calls to models, for a worker's /metrics.

`gate` calls the functions below.  Labels are models and endpoints of the settings, never a text
that a user sends.
"""

from __future__ import annotations

from resilience.errors import CallTimeout, RateLimited
from rlm_tasks.llm.endpoint_pool import Bill
from rlm_tasks.llm.wire.answers import Answer
from rlm_tasks.llm.wire.errors import ProviderRefused, UnusableAnswer
from rlm_tasks.metrics.declared import Counter, Histogram

LLM_CALLS = Counter(
    "rlm_llm_calls_total",
    "Calls to models, by how they ended.",
    {
        "model": None,
        "endpoint": None,
        "outcome": ("ok", "rate_limited", "timeout", "failed", "refused", "unusable", "no_text"),
    },
)
LLM_SECONDS = Histogram(
    "rlm_llm_call_seconds", "From a call to a model to its answer.", {"model": None}
)
LLM_TOKENS = Counter(
    "rlm_llm_tokens_total",
    "Tokens that calls to models are charged for.",
    {"model": None, "kind": ("prompt", "completion")},
)
LLM_MONEY = Counter(
    "rlm_llm_money_total",
    "Cost of calls to models, by the prices of the settings.",
    {"model": None},
)
LLM_SHARED = Counter(
    "rlm_llm_shared_total",
    "Answers that were used again without a call, by where they were kept.",
    {"source": ("memo", "cache", "flight")},
)
LLM_REFUSED = Counter(
    "rlm_llm_budget_refusals_total",
    "Calls to models that were refused because a job's budget is spent.",
)

OUTCOMES: dict[type, str] = {
    RateLimited: "rate_limited",
    CallTimeout: "timeout",
    ProviderRefused: "refused",
    UnusableAnswer: "unusable",
}
"""The outcome of each error; any other is `failed`, such as an endpoint that is away."""


def count_end(
    *,
    model: str,
    endpoint: str,
    answer: Answer | None,
    error: BaseException | None,
    bill: Bill,
) -> None:
    """Count a call that has ended, by its answer or its error, and what a budget is charged."""
    outcome = "ok" if answer is not None else OUTCOMES.get(type(error), "failed")
    if answer is not None:
        outcome = "no_text" if answer.fault else outcome
        LLM_SECONDS.observe(answer.latency_s, model=model)
    LLM_CALLS.inc(model=model, endpoint=endpoint, outcome=outcome)
    LLM_TOKENS.inc(bill.prompt, model=model, kind="prompt")
    LLM_TOKENS.inc(bill.completion, model=model, kind="completion")
    LLM_MONEY.inc(bill.amounts.get("money", 0.0), model=model)
