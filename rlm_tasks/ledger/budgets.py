"""The budget of a job and its rounds: one for the whole tree, with an account for each round.

A round that others follow keeps a share for them; the amount that it does not spend returns to the
budget.  Clients open budgets, `engine.rounds` opens and closes accounts, and `llm.gate` charges
calls to them.  Begin with `JobBudgets.open`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilience.store import Store
from rlm_tasks.jobs.spec import JobSpec

if TYPE_CHECKING:
    from resilience.budget import SharedBudget, Spending
    from rlm_tasks.settings.model import Settings

OPEN_S = 30 * 86_400
"""A budget is kept at least this long after its last charge, as the keys of an open job are."""


def account_of(spec: JobSpec) -> str:
    """Return the account that a round spends from."""
    return str(spec.round)


class JobBudgets:
    """The budgets of one platform's jobs."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._ttl_s = store, max(OPEN_S, settings.result_ttl_s)
        self._merge_share = settings.llm.merge_share
        self._lease_s = 2 * settings.llm.timeout_s

    def budget(self, tree: str) -> SharedBudget:
        """Return the budget of a job and its rounds."""
        from resilience.budget import SharedBudget  # only jobs that call models need it

        return SharedBudget(tree, self._store, ttl_s=self._ttl_s, lease_s=self._lease_s)

    def open(self, spec: JobSpec, *, last: bool) -> None:
        """Open the budget of a job, and the account of its items, before the job begins.

        `last` says that the job has no rounds.  Raises StoreUnavailable.
        """
        if spec.budget is not None:
            self.budget(spec.job).open(spec.budget)
            self.begin_round(spec, 0, last=last)

    def begin_round(self, spec: JobSpec, number: int, *, last: bool) -> None:
        """Open the account of a round.

        The last round gets the whole rest; any other leaves the share `merge_share` of it for the
        rounds that follow.
        """
        if spec.budget is not None:
            self.budget(spec.tree).carve(str(number), 1.0 if last else 1.0 - self._merge_share)

    def end_round(self, spec: JobSpec, number: int) -> None:
        """Return the rest of a round's account to the budget."""
        if spec.budget is not None:
            self.budget(spec.tree).fold(str(number))

    def spent(self, spec: JobSpec) -> Spending | None:
        """Return the spending of a job and its rounds so far, None for a job without a budget.

        Raises StoreUnavailable.
        """
        return self.budget(spec.tree).status() if spec.budget is not None else None
