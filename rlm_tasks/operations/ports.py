"""What an operation needs of the folders above it, as protocols: imports run down only.

The engine provides `CallGuards`, `llm` provides `Forecast`, and the package's face says how
`Operation.submit` opens a job (`submit_with`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from resilience.errors import Denied
    from resilience.store import Call
    from rlm_tasks.jobs.items import ItemSample
    from rlm_tasks.operations.context import Context
    from rlm_tasks.requests import JobRequest
    from rlm_tasks.results import JobResult, Progress, Status


class CallGuards(Protocol):
    """The guards of one operation's calls for one job: breaker, limits, bulkhead and retry."""

    def enter(self, item: Any, context: Context, waiter: str) -> Any:
        """Take what one call needs, all or nothing.  Raises Denied with the time to come back."""

    def leave(self, entry: Any, error: BaseException | None = None) -> None:
        """Report how a call ended, and return what it held."""

    def call(
        self,
        item: Any,
        context: Context,
        *,
        tries: int,
        waiter: str,
        within: Callable[..., Any],
    ) -> Any:
        """Call the operation; raises Postponed for an item that comes back, or its final error."""

    async def call_async(
        self,
        item: Any,
        context: Context,
        entry: Any,
        *,
        run: Callable[[], Awaitable[Any]],
        waiter: str,
        pause: Callable[[Any], Awaitable[None]],
    ) -> Any:
        """Await one entered item; `pause` sleeps between attempts, or raises the postponement."""

    def instead_of(self, denied: Denied) -> Callable[..., Any] | None:
        """Return the fallback to call instead of a denied call, None when there is none."""

    def still_waits(self, waiter: str) -> bool:
        """Whether a waiter is still noted at some guard."""

    def forgetting(self, until: int) -> list[Call]:
        """Return calls to make when the node's items before `until` are safe in its partial."""


@dataclass(frozen=True, slots=True)
class RoundForecast:
    """How many calls and tokens one round asks of the models of a tier, in all."""

    operation: str
    tier: Any  # small, medium or large
    calls: int
    prompt_tokens: float
    answer_tokens: float


class Forecast(Protocol):
    """Looks at a sample of a request's items once, and returns the rounds for an outlook.

    The request is settled, the items are those that were submitted; there is at least one.
    """

    def __call__(
        self, request: JobRequest, sample: ItemSample, /
    ) -> Callable[[Any], list[RoundForecast]]:
        """Return the function that gives the rounds of a job under an outlook on calls."""


class SubmittedJob(Protocol):
    """The handle that `Operation.submit` returns: `rlm_tasks.Job` has these methods, and more."""

    id: str

    @property
    def status(self) -> Status:
        """The job's state."""

    def progress(self) -> Progress:
        """Return how far the whole tree is."""

    def watch(self, interval_s: float = 0.2) -> Iterator[Progress]:
        """Yield the progress until the job has ended."""

    def wait(self, timeout: float | None = None) -> Status:
        """Wait for the end and return the final status."""

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end and return the result."""

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the output."""

    def explain(self) -> str:
        """Say in one sentence why the job waits, what it does, or how it ended."""

    def cancel(self) -> Status:
        """End the job."""


Submit = Callable[..., SubmittedJob]
_submit: list[Submit] = []


def submit_with(submit: Submit) -> None:
    """Set how `Operation.submit` opens a job; the package's face calls it when it is imported."""
    _submit[:] = [submit]


def submit(**request: Any) -> SubmittedJob:
    """Open a job with the default client.  Raises as `Client.submit` does."""
    return _submit[0](**request)
