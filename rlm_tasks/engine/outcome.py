"""The outcome of a running node so far: outputs or a folded partial, failures, counts.

`Work` adds to it item by item; `node` reports it.  Begin with `NodeOutcome.packed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from resilience.degradation import IN_FORCE, Degradation, Level, Strategy
from resilience.errors import text_of
from resilience.faults import Fault, classify
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.item_failures import failure_of, raise_if_shutdown
from rlm_tasks.operations.registry import Operation

FOLD_AT = 4096
"""A node with a merge folds this many outputs into one, so that its memory stays small."""
MOST_FAULTS = 100
"""Faults of one node that are recorded for operators."""
PAGE_FULL_AT = 65_536
"""A node without a merge reports its page at this many outputs."""


class NodeOutcome:
    """The outcome of a range, item by item."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._outputs: list[Any] = []
        self.done = 0
        # Indexes of items that neither succeeded nor failed here: empty, or failed in validation.
        self.left_out: set[int] = set()
        self.empty: list[int] = []
        self.failures: list[dict[str, Any]] = []
        self.faults: list[tuple[Fault, str]] = []  # at most MOST_FAULTS, with their messages
        self.given_up = 0  # items that failed although a retry might have helped
        # The number of items whose outcome a degradation strategy has changed.
        self.shaped: Counter[tuple[Strategy, Level]] = Counter()
        # The error of a merge, or of its result: it fails the job, not an item.
        self.fatal: dict[str, Any] | None = None

    @property
    def full(self) -> bool:
        """Whether the outputs fill a page."""
        return self._operation.merge is None and len(self._outputs) >= PAGE_FULL_AT

    def add(self, output: Any) -> None:
        """Keep the output of one item."""
        self._outputs.append(output)
        self.done += 1

    def count(self, _nothing: None) -> None:
        """Count an item that leaves no output."""
        self.done += 1

    def add_batch(self, output: Any, count: int) -> None:
        """Keep the output of a batch: one partial, or without a merge one output for each item.

        Raises TypeError when their number is not `count`.
        """
        if self._operation.merge is not None:
            self._outputs.append(output)
        elif not isinstance(output, Sequence) or len(output) != count:
            raise TypeError(f"a batch of {count} items must return a list of {count} outputs")
        else:
            self._outputs.extend(output)
        self.done += count

    def fail(self, index: int, error: BaseException) -> None:
        """Record an item's exception as a failure."""
        fault = classify(error)
        self.failures.append(failure_of(index, error, fault.code))
        self.given_up += fault.retryable
        if len(self.faults) < MOST_FAULTS:
            self.faults.append((fault, text_of(error)))

    def shape(self, degradation: Degradation, items: int) -> None:
        """Count the strategies that have changed the outcome of items, and reset them."""
        for strategy in degradation.shaped:
            self.shaped[strategy, degradation.level] += items
        degradation.shaped.clear()

    def leave_out(self, index: int, *, empty: bool) -> None:
        """Record an item that is not run."""
        self.left_out.add(index)
        if empty:
            self.empty.append(index)

    def fold(self, *, at: int = FOLD_AT) -> None:
        """Merge the outputs into one when there are `at` of them."""
        if self._operation.merge is None or len(self._outputs) < at or self.fatal:
            return
        outside = IN_FORCE.set(None)  # no level degrades a merge
        try:
            self._outputs = [self._operation.merge(iter(self._outputs))]
        except MemoryError:
            raise  # a smaller range may fit into memory
        except BaseException as error:
            raise_if_shutdown(error)
            self.fatal = failure_of(-1, error)
        finally:
            IN_FORCE.reset(outside)

    def packed(self, indexes: Iterable[int]) -> bytes:
        """Return the packed partial, b"" when no item succeeded or a merge failed.

        `indexes` are the node's items in order.  Without a merge, an output that cannot be stored
        becomes the failure of its item.  A merged output that cannot be stored fails the job.
        """
        self.fold(at=1)
        if not self._outputs or self.fatal:
            return b""
        try:
            if self._operation.merge is not None:
                return codec.pack(self._outputs[0])
            return codec.compress(codec.encode_all(self._outputs))
        except TypeError as error:
            if self._operation.merge is not None:
                self.fatal = failure_of(-1, error)
                return b""
            self._fail_unstorable(indexes)
            return codec.compress(codec.encode_all(self._outputs)) if self._outputs else b""

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
                self.fail(index, TypeError(f"its output cannot be stored: {error}"))
                self.done -= 1
        self._outputs = kept
