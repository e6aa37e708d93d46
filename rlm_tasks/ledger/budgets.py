"""What the rounds of a job may spend: one budget for the whole tree, of which each round gets an
account.

Decides how a budget is divided: a round that others follow leaves them a share, and what it does
not spend flows back. Refuses to know how a call is priced, and who makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilience.store import Store
from rlm_tasks.jobs.spec import JobSpec

if TYPE_CHECKING:
    from resilience.budget import SharedBudget, Spending
    from rlm_tasks.settings.model import Settings


def account_of(spec: JobSpec) -> str:
    """Return the account that a round spends from."""
    return str(spec.round)


class JobBudgets:
    """The budgets of one platform's jobs."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._ttl_s, self._merge_share = (
            store,
            settings.result_ttl_s,
            settings.llm.merge_share,
        )
        self._lease_s = 2 * settings.llm.timeout_s

    def budget(self, tree: str) -> SharedBudget:
        """Return the budget of a job and its rounds."""
        from resilience.budget import SharedBudget  # clients of jobs that call no models need none

        return SharedBudget(tree, self._store, ttl_s=self._ttl_s, lease_s=self._lease_s)

    def open(self, spec: JobSpec, *, last: bool) -> None:
        """Put aside what a job may spend, before it begins; `last` says that it has no rounds.
        Raises StoreUnavailable.
        """
        if spec.budget is not None:
            self.budget(spec.job).open(spec.budget)
            self.begin_round(spec, 0, last=last)

    def begin_round(self, spec: JobSpec, number: int, *, last: bool) -> None:
        """Give a round its account: all that is left, or, where others follow, what is not kept for
        them.
        """
        if spec.budget is not None:
            self.budget(spec.tree).carve(str(number), 1.0 if last else 1.0 - self._merge_share)

    def end_round(self, spec: JobSpec, number: int) -> None:
        """Let what a round has left flow back."""
        if spec.budget is not None:
            self.budget(spec.tree).fold(str(number))

    def spent(self, spec: JobSpec) -> Spending | None:
        """Return what a job and its rounds have spent so far, None where nothing is counted.
        Raises StoreUnavailable.
        """
        return self.budget(spec.tree).status() if spec.budget is not None else None
