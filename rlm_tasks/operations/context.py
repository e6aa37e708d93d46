"""The context of an operation: facts about its item and job, and questions about pressure.

The engine makes one for each call; an operation receives it as its second argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.degradation import Degradation

if TYPE_CHECKING:
    from resilience.bucket import Grant


FEW_PARAMS = 16
"""So few plain params are copied for each item: to find out whether it reads them costs more."""
_UNCHANGEABLE = {str, int, float, bool, bytes, type(None)}


def _is_flat(values: Iterable[Any]) -> bool:
    return _UNCHANGEABLE.issuperset(map(type, values))


def copied(value: Any) -> Any:
    """Return a copy of plain data that shares nothing changeable with it."""
    kind = type(value)
    if kind is dict:
        if _is_flat(value.values()):
            return value.copy()
        return {key: copied(each) for key, each in value.items()}
    if kind is list:
        if _is_flat(value):
            return value.copy()
        return [copied(each) for each in value]
    if kind is tuple:
        return tuple(map(copied, value))
    return value if kind.__hash__ is not None else deepcopy(value)


@dataclass(slots=True)
class Context:
    """Facts about an operation's item and job, and answers to what it may leave out."""

    job_id: str
    params: dict[str, Any]  # the params of the request; each item has its own copy
    depth: int = 0  # depth of the node in the tree
    attempt: int = 1  # number of this attempt at the node, from 1
    index: int = 0  # number of the item, or of the first item of a batch
    tries: int = 0  # earlier failures of this item
    waited: bool = False  # this item has waited for a guard
    rest: int = 1  # calls that its node could make now: for this item and those after it
    beside: int = 0  # other items of its node in flight when it asks its guards
    grant: Grant | None = None  # the amount that this call took of its rate limit
    has_params: bool = False  # `params` is a copy that this item has used
    entry: Any = None  # the call's state in the gate, if the operation has a gate
    degradation: Degradation = field(default_factory=Degradation)  # work to leave out
    shared_params: dict[str, Any] | None = None
    """The params of all items of a job, of which `params` becomes a copy at its first use."""

    has_few_params: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if (shared := self.shared_params) is not None:
            del self.params  # `__getattr__` makes it, so an item that reads none costs nothing
            self.has_few_params = len(shared) <= FEW_PARAMS and _is_flat(shared.values())

    def __getattr__(self, name: str) -> Any:
        """Make the item's own `params` when they are first used."""
        if name != "params" or self.shared_params is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.params, self.has_params = copied(self.shared_params), True
        return self.params

    def begin(self, index: int) -> None:
        """Begin an item, or another attempt at it: `params` is again as in the request."""
        self.index = index
        if self.has_few_params:
            self.params = self.shared_params.copy()  # type: ignore[union-attr]  # there are some
        elif self.has_params:
            del self.params
            self.has_params = False

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
