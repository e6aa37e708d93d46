"""Protocols by which operations use the folders above them, because imports run down only.

The engine provides `CallGuards` and `llm` provides `Forecast`.  `rlm_tasks.__init__` calls
`submit_with`, so that `Operation.submit` can open a job.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from resilience.store import Call
    from rlm_tasks.jobs.items import ItemSample
    from rlm_tasks.operations.context import Context
    from rlm_tasks.requests import JobRequest
    from rlm_tasks.results import JobResult, Progress, Status


class CallGuards(Protocol):
    """The guards of one operation's calls for one job: breaker, limits, bulkhead and retry."""

    def enter(self, item: Any, context: Context, waiter: str) -> Any:
        """Take all permits of one call, or none.  Raises Denied with the time to come back."""

    def leave(self, held: Any, error: BaseException | None = None) -> None:
        """Report how a call ended, and return what it held."""

    def call(
        self,
        item: Any,
        context: Context,
        *,
        tries: int,
        waiter: str,
        run: Callable[..., Any],
        again: Callable[[], Any] | None = None,
    ) -> Any:
        """Call the operation; `again` returns a new item for a fallback.

        Raises Postponed for an item that comes back, or its final error."""

    async def call_async(
        self,
        item: Any,
        context: Context,
        held: Any,
        *,
        run: Callable[[Any], Awaitable[Any]],
        again: Callable[[], Any],
        waiter: str,
        pause: Callable[[Any], Awaitable[None]],
    ) -> Any:
        """Await the call of an item that has entered.

        `pause` sleeps between attempts, or raises the postponement; `again` returns a new item.
        """

    def instead_of(self, error: Exception) -> Callable[..., Any] | None:
        """Return the fallback for a call that was denied or failed; None when there is none."""

    def still_waits(self, waiter: str) -> bool:
        """Return whether a waiter is still in the line of a guard."""

    def forgetting(self, until: int) -> list[Call]:
        """Return calls to Redis for the time when items before `until` are in a stored partial."""


@dataclass(frozen=True, slots=True)
class RoundForecast:
    """The calls and tokens that one round needs from the models of a tier, in all."""

    operation: str
    tier: Any  # small, medium or large
    kind: Any  # the kind of earlier calls that these are like
    items: int
    calls: int  # each item has one for each of its samples; and repairs
    prompt_tokens: float
    answer_tokens: float


class Forecast(Protocol):
    """A function that measures a sample of a request's items once.

    Its answer is a function from an outlook to the rounds.  The request has its defaults filled in;
    there is at least one item.
    """

    def __call__(
        self, request: JobRequest, sample: ItemSample, /
    ) -> Callable[[Any], list[RoundForecast]]:
        """Return the function that computes the rounds of a job from an outlook on calls."""


class SubmittedJob(Protocol):
    """The handle that `Operation.submit` returns: `rlm_tasks.Job` has these methods, and more."""

    id: str

    @property
    def status(self) -> Status:
        """The job's state."""

    def progress(self) -> Progress:
        """Return the counts of the whole tree."""

    def watch(self, interval_s: float = 0.2) -> Iterator[Progress]:
        """Yield the progress until the job has ended."""

    def wait(self, timeout: float | None = None) -> Status:
        """Wait for the end and return the final status."""

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end and return the result."""

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the output."""

    def explain(self) -> str:
        """Return a sentence: why the job waits, what it does, or how it ended."""

    def cancel(self) -> Status:
        """End the job."""


Submit = Callable[..., SubmittedJob]
_submit: list[Submit] = []


def submit_with(submit: Submit) -> None:
    """Set the function by which `Operation.submit` opens a job."""
    _submit[:] = [submit]


def submit(**request: Any) -> SubmittedJob:
    """Open a job with the default client.  Raises as `Client.submit` does."""
    return _submit[0](**request)
