"""The errors of a call to a model, as `llm.endpoint` raises them.

Users catch them; no message contains a part of the key or of the question.
"""

from __future__ import annotations

from resilience.errors import Category, RlmError


class UnusableAnswer(RlmError):
    """A response that is no answer: not JSON, empty, or cut off.  It may cost money.

    Has the `endpoint` and `why`.
    """

    code = "UNUSABLE_ANSWER"
    category = Category.TRANSIENT
    retryable = True
    trips = True

    def __init__(self, endpoint: str, why: str) -> None:
        self.endpoint, self.why = endpoint, why
        super().__init__(f"endpoint {endpoint}: its answer cannot be used ({why})")


class ProviderRefused(RlmError):
    """A refusal that will be the same at the next try, until a person acts.

    Has the `endpoint`, `why`, and the HTTP `status`.  `category` is AUTH, QUOTA or VALIDATION;
    `code` is CONTEXT_LENGTH_EXCEEDED if the prompt is too long.
    """

    def __init__(
        self, endpoint: str, category: Category, code: str, why: str, status: int = 0
    ) -> None:
        self.endpoint, self.category, self.code, self.why = endpoint, category, code, why
        self.status = status  # 0: no request was sent
        super().__init__(f"endpoint {endpoint}: {why}")


class ProviderDown(ConnectionError):
    """An endpoint that cannot be reached, or fails.

    Has the `endpoint`, `why`, and the time to wait as ``retry-after`` in `headers`.
    """

    def __init__(self, endpoint: str, why: str, wait_s: float | None = None) -> None:
        self.endpoint, self.why = endpoint, why
        # `classify` reads the wait from there.
        self.headers = {} if wait_s is None else {"retry-after": f"{wait_s:.3f}"}
        super().__init__(f"endpoint {endpoint}: {why}")
