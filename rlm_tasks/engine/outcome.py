"""What a node has so far: outputs or a folded partial, failures as data, counts.

Decides how outputs become one packed partial; refuses to know how items are run and when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from resilience.degradation import IN_FORCE, Degradation, Level, Strategy
from resilience.faults import Fault, classify
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.operations.registry import Operation

FOLD_AT = 4096
"""Outputs after which a node with a merge folds them into one, so that its memory stays flat."""
MOST_FAULTS = 100
PAGE_FULL_AT = 65_536
"""Outputs after which a node without a merge hands its page in."""


class NodeOutcome:
    """The outcome of a range, item by item."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._outputs: list[Any] = []
        self.done = 0
        self.left_out: set[int] = (
            set()
        )  # neither done nor failed here: empty, or failed in validation
        self.empty: list[int] = []
        self.failures: list[dict[str, Any]] = []
        self.faults: list[
            tuple[Fault, str]
        ] = []  # of the first MOST_FAULTS: for the log of recurring faults
        self.given_up = 0  # items that failed although they were worth another try
        self.shaped: Counter[tuple[Strategy, Level]] = (
            Counter()
        )  # items whose outcome a strategy has shaped
        self.fatal: dict[str, Any] | None = (
            None  # what a merge raised: it fails the job, not an item
        )

    @property
    def full(self) -> bool:
        """Whether there are as many outputs as one page should hold."""
        return self._operation.merge is None and len(self._outputs) >= PAGE_FULL_AT

    def add(self, output: Any) -> None:
        """Keep the output of one item."""
        self._outputs.append(output)
        self.done += 1

    def count(self, _nothing: None) -> None:
        """Count an item that leaves no output."""
        self.done += 1

    def add_batch(self, output: Any, count: int) -> None:
        """Keep what a batch returned: one partial, or one output per item.  Raises TypeError for
        neither.
        """
        if self._operation.merge is not None:
            self._outputs.append(output)
        elif not isinstance(output, Sequence) or len(output) != count:
            raise TypeError(f"a batch of {count} items must return a list of {count} outputs")
        else:
            self._outputs.extend(output)
        self.done += count

    def fail(self, index: int, error: BaseException) -> None:
        """Keep an item's exception as data."""
        fault = classify(error)
        self.failures.append(failure_of(index, error, fault.code))
        self.given_up += fault.retryable
        if len(self.faults) < MOST_FAULTS:
            self.faults.append((fault, str(error)))

    def shape(self, degradation: Degradation, items: int) -> None:
        """Count which strategies have shaped the outcome of items, and let the next ones begin
        anew.
        """
        for strategy in degradation.shaped:
            self.shaped[strategy, degradation.level] += items
        degradation.shaped.clear()

    def leave_out(self, index: int, *, empty: bool) -> None:
        """Note an item that is not worked on."""
        self.left_out.add(index)
        if empty:
            self.empty.append(index)

    def fold(self, *, at: int = FOLD_AT) -> None:
        """Merge the outputs into one when there are `at` of them."""
        if self._operation.merge is None or len(self._outputs) < at or self.fatal:
            return
        asked = IN_FORCE.set(None)  # a merge is whole at any level
        try:
            self._outputs = [self._operation.merge(iter(self._outputs))]
        except MemoryError:
            raise  # a smaller range may fit
        except Exception as error:
            self.fatal = failure_of(-1, error)
        finally:
            IN_FORCE.reset(asked)

    def packed(self, indexes: Iterable[int]) -> bytes:
        """Return the partial, packed; nothing when no item succeeded.

        `indexes` are the node's items in order: without a merge, an output that cannot be stored
        becomes the failure of its item; a merged one fails the job."""
        self.fold(at=1)
        if not self._outputs or self.fatal:
            return b""
        try:
            return codec.pack(self._outputs if self._operation.merge is None else self._outputs[0])
        except TypeError as error:
            if self._operation.merge is not None:
                self.fatal = failure_of(-1, error)
                return b""
            self._fail_unstorable(indexes)
            return codec.pack(self._outputs) if self._outputs else b""

    def _fail_unstorable(self, indexes: Iterable[int]) -> None:
        without = {failure["index"] for failure in self.failures} | self.left_out
        kept = []
        for index, output in zip(
            (each for each in indexes if each not in without), self._outputs, strict=True
        ):
            try:
                codec.encode(output)
                kept.append(output)
            except TypeError as error:
                self.fail(index, TypeError(f"its output cannot be stored as plain data: {error}"))
                self.done -= 1
        self._outputs = kept
