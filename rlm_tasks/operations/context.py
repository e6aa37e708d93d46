"""The context of an operation: facts about its item and job, and questions about pressure.

The engine makes one for each call; an operation receives it as its second argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.degradation import Degradation

if TYPE_CHECKING:
    from resilience.bucket import Grant


@dataclass(slots=True)
class Context:
    """Facts about an operation's item and job, and answers to what it may leave out."""

    job_id: str
    params: dict[str, Any]  # the params of the request
    depth: int = 0  # depth of the node in the tree
    attempt: int = 1  # number of this attempt at the node, from 1
    index: int = 0  # number of the item, or of the first item of a batch
    tries: int = 0  # earlier failures of this item
    waited: bool = False  # this item has waited for a guard
    rest: int = 1  # calls that its node could make now: for this item and those after it
    grant: Grant | None = None  # the amount that this call took of its rate limit
    entry: Any = None  # the call's state in the gate, if the operation has a gate
    degradation: Degradation = field(default_factory=Degradation)  # work to leave out

    @property
    def attempt_key(self) -> str:
        """A key of this item that is the same at each attempt.

        An item whose process dies runs again, so its side effects may happen twice.  Pass this key
        as an idempotency key: to a payment, a mail, an INSERT ... ON CONFLICT DO NOTHING.
        """
        return f"{self.job_id}:{self.index}"

    def settle(self, **used: float) -> None:
        """Replace the amount taken of the rate limit by the amount used.

        ``ctx.settle(tokens=730)``.
        """
        if self.grant is not None:
            self.grant.settle(**used)

    # --- doing less under pressure; the job's receipt counts each answer that left work out ----

    def limit(self, most: int) -> int:
        """Return the number of entities to use, of `most`.

        All of them, 80 %, 50 % (critical) or 30 % (emergency).
        """
        return self.degradation.limit(most)

    def embedding_dimensions(self, full: int) -> int:
        """Return the dimensions that an embedding should have: `full`, or half from critical on."""
        return self.degradation.embedding_dimensions(full)

    @property
    def skip_optional(self) -> bool:
        """Whether to leave out optional work: from high pressure on."""
        return self.degradation.skip_optional

    @property
    def skip_expensive(self) -> bool:
        """Whether to leave out expensive work: from high pressure on."""
        return self.degradation.skip_expensive

    @property
    def simplified(self) -> bool:
        """Whether to use the simple method: from critical pressure on."""
        return self.degradation.simplified

    @property
    def quality(self) -> str:
        """A text to add to your own cache keys, so that degraded answers are kept apart.

        It is '' for a full answer.
        """
        return self.degradation.constraints.fingerprint
