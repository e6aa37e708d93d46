"""What calls to models count for a worker's /metrics.

Decides under which outcome an error is counted.  Refuses to know who reads it, and to name anything that a user sends:
labels are models and endpoints of the settings.
"""

from __future__ import annotations

from resilience.errors import CallTimeout, RateLimited
from rlm_tasks.llm.endpoint import Answer, ProviderRefused, UnusableAnswer
from rlm_tasks.metrics.declared import LLM_CALLS, LLM_MONEY, LLM_SECONDS, LLM_TOKENS

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
