"""The shared page: the level, urgent work, slots and memory that the main process writes for its
pool.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import Level
from rlm_tasks.engine.shared_page import NO_ITEM, Held, SharedPage, Step, Steps


class Watch:
    """A monotonic clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


# --- the level --------------------------------------------------------------------------------


def test_before_the_first_measurement_the_level_is_normal() -> None:
    assert SharedPage().level is Level.NORMAL


@pytest.mark.parametrize("level", Level)
def test_a_level_that_is_not_renewed_counts_as_elevated(watch: Watch, level: Level) -> None:
    page = SharedPage(stale_s=15, clock=watch)
    page.level = level
    assert page.level is level
    watch.now += 15
    assert page.level is level
    watch.now += 0.01
    assert page.level is Level.ELEVATED, "an old level is not trusted, and does not count as normal"
    page.level = level
    assert page.level is level


@given(st.floats(0.001, 1e9), st.sampled_from(Level), st.floats(0, 14.9))
def test_a_level_holds_on_a_host_of_any_age(uptime_s: float, level: Level, later_s: float) -> None:
    watch = Watch()
    watch.now = uptime_s
    page = SharedPage(stale_s=15, clock=watch)
    page.level = level
    watch.now += later_s
    assert page.level is level


def test_a_child_reads_values_that_its_parent_writes_after_the_fork() -> None:
    page = SharedPage()
    asked, answer = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        os.read(asked[0], 1)
        os.write(
            answer[1],
            bytes(
                [
                    page.level,
                    page.urgent,
                    page.slots,
                    int(page.available_mb),
                    int(page.free_mb or 0),
                ]
            ),
        )
        os._exit(0)
    page.level, page.urgent, page.slots, page.available_mb, page.free_mb = (
        Level.CRITICAL,
        0b11,
        7,
        64.0,
        32.0,
    )
    os.write(asked[1], b"!")
    values = os.read(answer[0], 5)
    os.waitpid(pid, 0)
    for end in (*asked, *answer):
        os.close(end)
    assert list(values) == [Level.CRITICAL, 0b11, 7, 64, 32]


def median_ns(read: Callable[[], object], *, rounds: int = 51, reads: int = 1000) -> float:
    def once() -> float:
        began = time.perf_counter_ns()
        for _ in range(reads):
            read()
        return (time.perf_counter_ns() - began) / reads

    return statistics.median(once() for _ in range(rounds))


def test_reading_the_level_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    class Plain:
        level = Level.HIGH

    page, plain = SharedPage(), Plain()
    page.level = Level.HIGH

    shared, attribute = median_ns(lambda: page.level), median_ns(lambda: plain.level)

    with capsys.disabled():
        print(f"\n  level from the page: {shared:.0f} ns; a plain attribute: {attribute:.0f} ns")
    assert page.level is plain.level


# --- the other fields -------------------------------------------------------------------------


def test_the_values_of_a_new_page() -> None:
    page = SharedPage()
    assert (page.urgent, page.slots, page.available_mb, page.free_mb) == (0, 1, 0.0, None)


def test_no_field_overlaps_another() -> None:
    page = SharedPage()
    page.level, page.urgent, page.slots, page.available_mb, page.free_mb = (
        Level.HIGH,
        0b1111,
        1024,
        123.5,
        0.0,
    )
    page.draining = page.hungry = page.terminating = True
    page.recall()
    held = page.entry(0)
    held.hold(os.getpid(), "job", "node", "00" * 8, 0.0)

    assert (page.level, page.urgent, page.slots) == (Level.HIGH, 0b1111, 1024)
    assert (page.available_mb, page.free_mb) == (123.5, 0.0), "a host without free memory is known"
    assert (page.draining, page.hungry, page.terminating, page.recalls) == (True, True, True, 1)
    assert [each.job for each in page.held()] == ["job"]


def test_the_number_of_slots_is_at_least_one() -> None:
    page = SharedPage()
    page.slots = 0
    assert page.slots == 1


# --- nodes held by processes ------------------------------------------------------------------


def test_the_page_lists_the_node_of_each_process() -> None:
    page = SharedPage()
    first, second = page.entry(0), page.entry(7)
    first.hold(11, "job-a", "node-a", "00112233aabbccdd", 1.5)
    second.hold(12, "job-b", "node-b", "ff" * 8, 2.5)

    second.start_item(42)
    second.limit(30.0)
    first.start_item(41)
    first.boundary(9.5)

    held = {each.pid: each for each in page.held()}
    assert held[11] == Held(11, "job-a", "node-a", "00112233aabbccdd", -1, 9.5, 0.0)
    assert held[12].item == 42
    first.let_go()
    assert [each.pid for each in page.held()] == [12]


def test_a_forked_process_writes_to_the_same_page() -> None:
    page = SharedPage()
    child = os.fork()
    if child == 0:
        page.entry(1).hold(os.getpid(), "job", "node", "00" * 8, 0.0)
        os._exit(0)
    os.waitpid(child, 0)

    assert [each.pid for each in page.held()] == [child]
    page.draining = page.hungry = True
    assert (page.draining, page.hungry) == (True, True)


def test_an_item_goes_on_after_a_step_with_its_own_start_and_limit() -> None:
    page, now = SharedPage(), [5.0]
    entry = page.entry(0)
    entry.hold(pid=11, job="job-a", node="node-a", token="00112233aabbccdd", at=1.0)
    entry.limit(9.0)
    steps = Steps(entry, lambda: now[0], limit_s=60.0)
    with steps.run(Step.READING):
        [held] = page.held()
        assert (held.step, held.since, held.limit_s) == (Step.READING, 5.0, 60.0)
        now[0] = 6.0
    [held] = page.held()
    assert (held.item, held.since, held.limit_s) == (NO_ITEM, 6.0, 9.0), "reading is no item's time"

    entry.start_item(3)
    now[0] = 7.0
    with pytest.raises(ValueError, match="raised in it"), steps.run(Step.MERGE):
        raise ValueError("raised in it")
    [held] = page.held()
    assert (held.item, held.since, held.limit_s, held.step) == (3, 6.0, 9.0, None)
