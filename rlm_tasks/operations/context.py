"""What an operation may ask about the run that it is part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.degradation import Degradation

if TYPE_CHECKING:
    from resilience.bucket import Grant


@dataclass(slots=True)
class Context:
    """What an operation may ask about the run it is part of."""

    job_id: str
    params: dict[str, Any]  # those of the request
    depth: int = 0  # of the node in the tree
    attempt: int = 1  # at this node, from 1
    index: int = 0  # of the item being worked on; of the first item in a batch
    tries: int = 0  # how often this item has failed before
    waited: bool = False  # this item comes back from waiting for a guard
    rest: int = 1  # so many calls its node would make at once, were they granted: this item's, and of those behind it
    grant: Grant | None = None  # what this call took of its rate limit
    entry: Any = (
        None  # what its gate has given this call, where the operation has a gate of its own
    )
    degradation: Degradation = field(
        default_factory=Degradation
    )  # what this item is asked to leave out

    @property
    def attempt_key(self) -> str:
        """The same at every attempt at this item, and no other's.

        An item whose process dies runs again, so what it does outside of its answer may happen
        twice; give this to what it calls as an idempotency key (a payment, a mail, an INSERT ... ON
        CONFLICT DO NOTHING)."""
        return f"{self.job_id}:{self.index}"

    def settle(self, **used: float) -> None:
        """Correct what this call took of its rate limit to what it really used:
        ``ctx.settle(tokens=730)``.
        """
        if self.grant is not None:
            self.grant.settle(**used)

    # --- doing less under pressure: what is asked here is told in the job's receipt ------------

    def limit(self, most: int) -> int:
        """Return how many of `most` entities to look at: all, 80 %, 50 % (critical) or 30 %
        (emergency).
        """
        return self.degradation.limit(most)

    def embedding_dimensions(self, full: int) -> int:
        """Return how many of `full` dimensions an embedding is to have: half from critical pressure
        on.
        """
        return self.degradation.embedding_dimensions(full)

    @property
    def skip_optional(self) -> bool:
        """Whether to leave out what the answer can do without: from high pressure on."""
        return self.degradation.skip_optional

    @property
    def skip_expensive(self) -> bool:
        """Whether to leave out what costs much: from high pressure on."""
        return self.degradation.skip_expensive

    @property
    def simplified(self) -> bool:
        """Whether to use the simple method: from critical pressure on."""
        return self.degradation.simplified

    @property
    def quality(self) -> str:
        """What a cache key of one's own must contain, so that a degraded answer is not kept as a
        full one; '' is full.
        """
        return self.degradation.constraints.fingerprint
