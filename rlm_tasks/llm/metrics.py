"""What calls to models count for a worker's /metrics.

Decides under which outcome an error is counted.  Refuses to know who reads it, and to name anything
that a user sends: labels are models and endpoints of the settings."""

from __future__ import annotations

from resilience.errors import CallTimeout, RateLimited
from rlm_tasks.llm.endpoint import Answer, ProviderRefused, UnusableAnswer
from rlm_tasks.metrics.declared import Counter, Histogram

LLM_CALLS = Counter(
    "rlm_llm_calls_total",
    "Calls to models, by how they ended.",
    {
        "model": None,
        "endpoint": None,
        "outcome": ("ok", "rate_limited", "timeout", "failed", "refused", "unusable"),
    },
)
LLM_SECONDS = Histogram(
    "rlm_llm_call_seconds", "From a call to a model to its answer.", {"model": None}
)
LLM_TOKENS = Counter(
    "rlm_llm_tokens_total",
    "Tokens that calls to models were paid for.",
    {"model": None, "kind": ("prompt", "completion")},
)
LLM_MONEY = Counter(
    "rlm_llm_money_total",
    "What calls to models have cost, by the prices of the settings.",
    {"model": None},
)
LLM_SHARED = Counter(
    "rlm_llm_shared_total",
    "Answers that were not paid again, by where they were.",
    {"source": ("memo", "cache", "flight")},
)
LLM_REFUSED = Counter(
    "rlm_llm_budget_refusals_total",
    "Calls to models that were not made, because a job's budget is spent.",
)

OUTCOMES: dict[type, str] = {
    RateLimited: "rate_limited",
    CallTimeout: "timeout",
    ProviderRefused: "refused",
    UnusableAnswer: "unusable",
}
"""What else ends a call has `failed`: an endpoint that is away, or a node that was told to stop."""


def answered(model: str, endpoint: str, answer: Answer, money: float) -> None:
    """Count a call that was answered, whatever became of the answer here."""
    LLM_CALLS.inc(model=model, endpoint=endpoint, outcome="ok")
    LLM_SECONDS.observe(answer.latency_s, model=model)
    paid(model, answer.prompt_tokens, answer.completion_tokens, money)


def failed(model: str, endpoint: str, error: BaseException | None) -> None:
    """Count a call that was not."""
    LLM_CALLS.inc(model=model, endpoint=endpoint, outcome=OUTCOMES.get(type(error), "failed"))


def paid(model: str, prompt: float, completion: float, money: float) -> None:
    """Count what a call is paid for, as its job's budget is."""
    LLM_TOKENS.inc(prompt, model=model, kind="prompt")
    LLM_TOKENS.inc(completion, model=model, kind="completion")
    LLM_MONEY.inc(money, model=model)
