"""The outcome of a running node so far: outputs or a folded partial, failures, counts.

`Work` adds to it item by item; `node` reports it.  Begin with `NodeOutcome.packed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from resilience.degradation import IN_FORCE, Degradation, Level, Strategy
from resilience.errors import is_a, text_of
from resilience.faults import Fault, classify
from rlm_tasks.engine.shared_page import Step, Steps
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.index_ranges import IndexRanges
from rlm_tasks.jobs.item_failures import failure_of, raise_if_shutdown
from rlm_tasks.jobs.sizes import estimated_bytes
from rlm_tasks.ledger.output_limit import OutputLimit
from rlm_tasks.operations.registry import Operation

FOLD_AT = 4096
"""A node with a merge folds this many outputs into one, so that its memory stays small."""
MOST_FAULTS = 100
"""Faults of one node that are recorded for operators."""
FAILURES_FULL_AT = 2048
"""A node reports at this many failures, so that one script of the ledger stays short."""
PAGE_OVERHEAD = 64
"""The largest number of bytes that a page has besides its outputs."""
PAGE_FULL_AT = 65_536
"""A node without a merge reports its page at this many outputs."""


class NodeOutcome:
    """The outcome of a range, item by item."""

    def __init__(
        self, operation: Operation, steps: Steps, most_bytes: float = float("inf")
    ) -> None:
        """`most_bytes` is the memory that outputs may hold before the node reports them."""
        self._operation, self._steps, self._most_bytes = operation, steps, most_bytes
        self._outputs: list[Any] = []
        self.done = 0
        # Indexes of items that neither succeeded nor failed here: empty, or failed in validation.
        self.left_out: set[int] = set()
        self.empty: list[int] = []
        self.has_failed = False  # an item has failed
        self.failures: list[dict[str, Any]] = []
        self.unread: list[dict[str, Any]] = []  # failures of ranges: from `index` to before `until`
        self._unread: list[tuple[int, int]] = []  # all ranges that could not be read
        self._weighed, self._held_bytes = 0, 0  # outputs whose size is estimated, and this size
        self.faults: list[tuple[Fault, str]] = []  # at most MOST_FAULTS, with their messages
        self.given_up = 0  # items that failed although a retry might have helped
        # The number of items whose outcome a degradation strategy has changed.
        self.shaped: Counter[tuple[Strategy, Level]] = Counter()
        # The error of a merge, or of its result: it fails the job, not an item.
        self.fatal: dict[str, Any] | None = None

    @property
    def full(self) -> bool:
        """Whether the node must report now: its outputs or its failures are many, or large."""
        return (
            self.is_heavy
            or len(self.failures) + len(self.unread) >= FAILURES_FULL_AT
            or (self._operation.merge is None and len(self._outputs) >= PAGE_FULL_AT)
        )

    @property
    def is_heavy(self) -> bool:
        """Whether the outputs hold more memory than a node may hold, by an estimate."""
        self._held_bytes += estimated_bytes(self._outputs, self._weighed)
        self._weighed = len(self._outputs)
        return self._held_bytes >= self._most_bytes

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
            raise TypeError(
                f"a batch of {count} items must return a list of {count} outputs, not "
                f"{type(output).__name__}; return one for each item, or declare a merge"
            )
        else:
            self._outputs.extend(output)
        self.done += count

    def fail(self, index: int, error: BaseException) -> None:
        """Record an item's exception as a failure."""
        fault, self.has_failed = classify(error), True
        self.failures.append(failure_of(index, error, fault.code))
        self.given_up += fault.retryable
        if len(self.faults) < MOST_FAULTS:
            self.faults.append((fault, text_of(error)))

    def fail_range(self, lo: int, hi: int, error: Exception, known: IndexRanges) -> None:
        """Record one failure for a range of items that cannot be read; `known` have failed before.

        Neighbours that fail with the same type of error have the failure of the first of them.
        """
        self._unread.append((lo, hi))
        last = self.unread[-1] if self.unread else {}
        for start, end in known.gaps(lo, hi):
            if last.get("until") == start and last["type"] == type(error).__name__:
                last["until"] = end
                continue
            fault, self.has_failed = classify(error), True
            last = {**failure_of(start, error, fault.code), "until": end}
            self.unread.append(last)
            if len(self.faults) < MOST_FAULTS:
                self.faults.append((fault, last["message"]))

    @property
    def failed_count(self) -> int:
        """The number of failed items."""
        ranges: int = sum(each["until"] - each["index"] for each in self.unread)
        return len(self.failures) + ranges

    def failed_items(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the indexes of failed items: single ones, and ranges of two and more."""
        single = ((each["index"], each["index"] + 1) for each in self.failures)
        ranges = ((each["index"], each["until"]) for each in self.unread)
        runs: list[tuple[int, int]] = []
        for lo, hi in sorted((*single, *ranges)):
            if runs and runs[-1][1] == lo:
                runs[-1] = runs[-1][0], hi
            else:
                runs.append((lo, hi))
        return [lo for lo, hi in runs if hi - lo == 1], [
            each for each in runs if each[1] - each[0] > 1
        ]

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
        if self._operation.merge is None or self.fatal:
            return
        if len(self._outputs) < at and not (self.is_heavy and len(self._outputs) > 1):
            return
        outside = IN_FORCE.set(None)  # no level degrades a merge
        try:
            with self._steps.run(Step.MERGE):
                self._outputs = [self._operation.merge(iter(self._outputs))]
        except MemoryError:
            raise  # a smaller range may fit into memory
        except BaseException as error:
            raise_if_shutdown(error)
            self.fatal = failure_of(-1, error)
        finally:
            IN_FORCE.reset(outside)
            self._weighed, self._held_bytes = 0, 0

    def packed(self, indexes: Sequence[int], limit: OutputLimit) -> list[tuple[int, bytes]]:
        """Return the packed partials, each with its first item; none without an output.

        `indexes` are the node's items in order.  There is one partial, unless the outputs are too
        large for one value.  An output that cannot be stored becomes the failure of its item; a
        merged output that cannot be stored fails the job.
        """
        self.fold(at=1)
        if not self._outputs or self.fatal:
            return []
        merges = self._operation.merge is not None
        try:
            partial = codec.pack(self._outputs[0]) if merges else _page(self._outputs)
            return [(indexes[0], limit.checked(partial, "the merged partial"))]
        except MemoryError:
            raise  # a later attempt may have memory
        except BaseException as error:  # an output's own method may have raised anything
            raise_if_shutdown(error)
            if merges:
                self.fatal = failure_of(-1, error)
                return []
            return self._pages(indexes, limit)

    def _pages(self, indexes: Sequence[int], limit: OutputLimit) -> list[tuple[int, bytes]]:
        """Fail the items whose outputs cannot be stored; pack the others in several partials."""
        pages: list[tuple[int, list[Any]]] = [(indexes[0], [])]
        held = 0
        for index, output in self._with_indexes(indexes):
            try:
                encoded = codec.encode(output)
                limit.checked(codec.compress(encoded), f"the output of item {index}")
            except MemoryError:
                raise
            except BaseException as error:
                raise_if_shutdown(error)
                unstorable = is_a(error, TypeError)
                self.fail(
                    index,
                    TypeError(f"its output cannot be stored: {error}") if unstorable else error,
                )
                self.done -= 1
                continue
            size = held + len(encoded) + PAGE_OVERHEAD
            if pages[-1][1] and size > limit.bytes_for(size):
                pages.append((index, []))
                held = 0
            pages[-1][1].append(output)
            held += len(encoded)
        return [(first, _page(outputs)) for first, outputs in pages if outputs]

    def _with_indexes(self, indexes: Iterable[int]) -> Iterable[tuple[int, Any]]:
        """Return each output with the index of its item."""
        without = {failure["index"] for failure in self.failures} | self.left_out
        unread = IndexRanges(self._unread)
        succeeded = [each for each in indexes if each not in without and each not in unread]
        return zip(succeeded, self._outputs, strict=True)


def _page(outputs: list[Any]) -> bytes:
    """Return the packed partial of a node without a merge: the list of its outputs."""
    return codec.compress(codec.encode_all(outputs))
