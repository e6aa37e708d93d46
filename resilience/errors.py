"""The root of every error a user can meet.

    RlmError
    ├── StoreUnavailable      Redis does not answer
    └── (rlm_tasks.errors)    requests and jobs

An error carries its data as attributes first; the message says what to do next.
Refuses to know what a job is.
"""

from __future__ import annotations


class RlmError(Exception):
    """Base of every error this platform raises on purpose."""

    code = "RLM_ERROR"
    retryable = False


class StoreUnavailable(RlmError):
    """Redis cannot be reached, or stopped answering."""

    code = "SERVICE_UNAVAILABLE"
    retryable = True

    def __init__(self, url: str, cause: str) -> None:
        self.url, self.cause = url, cause
        super().__init__(f"Redis at {url} does not answer ({cause}); start it, or set RLM_REDIS_URL")
