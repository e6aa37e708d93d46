"""Items as nodes read them: new at each attempt, and one failure for those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from resilience.bucket import Rate
from resilience.errors import StoreUnavailable
from resilience.retry import RetryPolicy
from rlm_tasks import Conditions, JobRequest, NWay, Options, operation
from rlm_tasks.engine.node import run_node
from rlm_tasks.engine.outcome import FAILURES_FULL_AT
from rlm_tasks.jobs.items import Lines
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import STAGED_S
from rlm_tasks.ledger.records import ROOT, Finished, Report
from rlm_tasks.settings.model import Settings
from tests.unit.harness import Platform
from tests.unit.stories.test_waiting import WaitingPlatform

QUICK = RetryPolicy(max_attempts=3, initial_delay_s=0.001, max_delay_s=0.002)
_failed_once: set[int] = set()


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _emptied(row: dict[str, Any]) -> int:
    """Return a value and take it out of its row, as careless code does; fail as the row says."""
    value: int = row.pop("v")
    if row.pop("bad", False):
        raise ValueError("a bad row")
    if row.pop("once", False) and value not in _failed_once:
        _failed_once.add(value)
        raise ConnectionError("comes back")
    return value


@operation("unit_empties", merge=_concatenated)
def unit_empties(row: dict[str, Any]) -> list[int]:
    """Change the item in place."""
    return [_emptied(row)]


@operation("unit_empties_batch", batch=True, merge=_concatenated)
def unit_empties_batch(rows: list[dict[str, Any]]) -> list[int]:
    """Change the items in place."""
    return [_emptied(row) for row in rows]


@operation("unit_empties_retried", merge=_concatenated, retry=QUICK)
def unit_empties_retried(row: dict[str, Any]) -> list[int]:
    """Change the item in place; it is tried again."""
    return [_emptied(row)]


@operation(
    "unit_empties_async",
    merge=_concatenated,
    retry=QUICK,
    concurrency=3,
    rate_limit=Rate(1000, 1.0),
    cost=lambda row: {"requests": row["v"] / row["v"]},
)
async def unit_empties_async(row: dict[str, Any]) -> list[int]:
    """Change the item in place; it is tried again beside others, and its cost is asked again."""
    return [_emptied(row)]


@operation("unit_collects", merge=_concatenated, validate=lambda line: None)
def unit_collects(line: str) -> list[str]:
    """Return the item in a list."""
    return [line]


@operation("unit_collects_batch", batch=True)
def unit_collects_batch(lines: list[str]) -> list[str]:
    """Return the items."""
    return list(lines)


@operation("unit_collects_async", concurrency=7)
async def unit_collects_async(line: str) -> str:
    """Return the item."""
    return line


def _used_up(numbers: list[int]) -> list[int]:
    """Return the values of a batch and empty its list; -1 is a bad value."""
    values = []
    while numbers:
        if (value := numbers.pop(0)) < 0:
            raise ValueError("a bad value")
        values.append(value)
    return values


def _grown(numbers: list[int]) -> list[int]:
    """Return the values of a batch, to whose list a header was added."""
    numbers.insert(0, -7)
    if -1 in numbers:
        raise ValueError("a bad value")
    return numbers[1:]


operation("unit_uses_up", batch=True)(_used_up)
operation("unit_uses_up_merged", batch=True, merge=_concatenated)(_used_up)
operation("unit_grows", batch=True)(_grown)
operation("unit_grows_merged", batch=True, merge=_concatenated)(_grown)


def _fallen_back(rows: Any) -> list[int]:
    """Return the negative values of one row or of a batch."""
    return [-row["v"] for row in (rows if isinstance(rows, list) else [rows])]


GIVES_UP = RetryPolicy(max_attempts=1)


@operation("unit_falls_back", merge=_concatenated, retry=GIVES_UP, fallback=_fallen_back)
def unit_falls_back(row: dict[str, Any]) -> list[int]:
    """Change the item in place; the fallback answers after the last attempt."""
    return [_emptied(row)]


@operation(
    "unit_falls_back_batch", batch=True, merge=_concatenated, retry=GIVES_UP, fallback=_fallen_back
)
def unit_falls_back_batch(rows: list[dict[str, Any]]) -> list[int]:
    """Change the items and their list in place; the fallback answers after the last attempt."""
    return [_emptied(rows.pop(0)) for _ in range(len(rows))]


@operation(
    "unit_falls_back_async",
    merge=_concatenated,
    retry=GIVES_UP,
    fallback=_fallen_back,
    concurrency=3,
)
async def unit_falls_back_async(row: dict[str, Any]) -> list[int]:
    """Change the item in place; the fallback answers after the last attempt."""
    return [_emptied(row)]


def rows(n: int = 9, **special: int) -> list[dict[str, Any]]:
    """Return rows of a value each; `bad=3` marks the fourth row with `bad`."""
    marks = {index: {mark: True} for mark, index in special.items()}
    return [{"v": i + 1, **marks.get(i, {})} for i in range(n)]


def submitted(platform: Platform, name: str, items: Any, **more: Any) -> JobSpec:
    """Submit a job that continues on errors."""
    options = Options(continue_on_error=more.pop("continue_on_error", True))
    return platform.submit(JobRequest(operation=name, items=items, options=options, **more))


# --- items that user code changes --------------------------------------------------------------


def test_a_node_that_is_redone_after_an_outage_reads_new_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform = Platform()
    spec = submitted(platform, "unit_empties", rows(4))
    finish = platform.ledger.finish

    def away(*_: Any, **__: Any) -> Finished:
        monkeypatch.setattr(platform.ledger, "finish", finish)
        raise StoreUnavailable("redis://fake", "away")

    monkeypatch.setattr(platform.ledger, "finish", away)
    with pytest.raises(StoreUnavailable):
        run_node(platform.runtime, spec.job, ROOT)
    platform.store.client.zadd(platform.keys.of(spec.job).due, {ROOT: 1})  # its lease is over

    facts = platform.run(spec)

    assert (facts["done"], facts["failed"]) == ("4", "0")
    assert platform.output(spec) == [1, 2, 3, 4]


@pytest.mark.parametrize("bad", [0, 3, 8])
def test_one_bad_row_of_a_batch_fails_alone(bad: int) -> None:
    platform = Platform(seed=bad)
    spec = submitted(platform, "unit_empties_batch", rows(bad=bad))

    platform.run(spec)

    assert platform.output(spec) == [row["v"] for row in rows() if row["v"] != bad + 1]
    [failure] = platform.ledger.failures(spec.job)
    assert (failure.index, failure.type) == (bad, "ValueError")


@pytest.mark.parametrize("bad", [None, 0, 7])
@pytest.mark.parametrize("name", ["unit_uses_up", "unit_grows"])
@pytest.mark.parametrize("merged", ["", "_merged"])
def test_a_batch_may_change_its_list(name: str, merged: str, bad: int | None) -> None:
    platform = Platform(seed=4)
    values = [-1 if i == bad else i for i in range(20)]
    spec = submitted(platform, name + merged, values)

    facts = platform.run(spec)

    assert platform.output(spec) == [i for i in range(20) if i != bad]
    assert (facts["done"], facts["failed"]) == (
        str(20 - (bad is not None)),
        str(+(bad is not None)),
    )
    assert [each.index for each in platform.ledger.failures(spec.job)] == [bad] * (bad is not None)


@pytest.mark.parametrize("name", ["unit_empties_retried", "unit_empties_async"])
def test_a_further_attempt_gets_a_new_item(name: str) -> None:
    _failed_once.clear()
    platform = WaitingPlatform(seed=1)
    spec = submitted(platform, name, rows(once=2))

    facts = platform.run_all(spec)

    assert (facts["done"], facts["failed"]) == ("9", "0")
    assert platform.output(spec) == [row["v"] for row in rows()]


@pytest.mark.parametrize("name", ["unit_empties_async", "unit_falls_back"])
def test_an_outage_between_two_attempts_is_no_failure_of_the_item(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failed_once.clear()
    platform = WaitingPlatform(seed=1)
    spec = submitted(platform, name, rows(once=2))
    read = platform.runtime.items.read

    def away_once(*, lo: int, hi: int, **keys: Any) -> Any:
        if (lo, hi) == (2, 3) and _failed_once:
            monkeypatch.setattr(platform.runtime.items, "read", read)
            raise StoreUnavailable("redis://fake", "away")
        return read(lo=lo, hi=hi, **keys)

    monkeypatch.setattr(platform.runtime.items, "read", away_once)

    facts = platform.run_all(spec)

    assert platform.runtime.items.read == read, "the outage came"
    assert (facts["done"], facts["failed"]) == ("9", "0")
    assert platform.output(spec) == [row["v"] for row in rows()]


@pytest.mark.parametrize(
    "name", ["unit_falls_back", "unit_falls_back_batch", "unit_falls_back_async"]
)
def test_a_fallback_gets_the_item_as_it_was(name: str) -> None:
    _failed_once.clear()
    platform = WaitingPlatform(seed=2)
    items: list[Any] = rows(once=2)
    items.insert(1, {})
    spec = submitted(platform, name, items, conditions=Conditions(skip_if_empty=True))

    facts = platform.run_all(spec)

    assert (facts["done"], facts["failed"], facts["skipped"]) == ("9", "0", "1")
    assert sorted(map(abs, platform.output(spec))) == list(range(1, 10))
    assert -3 in platform.output(spec)


# --- items that cannot be read -----------------------------------------------------------------

NAMES = ("unit_collects", "unit_collects_batch", "unit_collects_async")


def file_of(folder: Path, lines: int) -> Path:
    """Write a file of numbered lines."""
    (path := folder / "lines.txt").write_text("".join(f"{i}\n" for i in range(lines)))
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("continue_on_error", [True, False])
def test_a_file_that_changed_fails_its_items_as_one_range(
    tmp_path: Path, name: str, continue_on_error: bool
) -> None:
    platform, path = Platform(), file_of(tmp_path, 30_000)
    spec = submitted(platform, name, Lines(path), continue_on_error=continue_on_error)
    path.write_text("mended\n")

    facts = platform.run(spec)

    keys, client = platform.keys.of(spec.job), platform.store.client
    assert (facts["done"], facts["failed"], facts["skipped"]) == ("0", "30000", "0")
    assert (client.zcard(keys.failed), client.hlen(keys.failures)) == (1, 1)
    failures = platform.ledger.failures(spec.job)
    assert [each.index for each in failures] == list(range(1000))
    assert {(each.type, each.code) for each in failures} == {
        ("ItemsUnreadable", "ITEMS_UNREADABLE")
    }
    assert f"{path} has changed" in failures[0].message
    assert platform.ledger.failed_items(spec.job) == list(range(30_000))


@pytest.mark.parametrize("name", NAMES)
def test_a_line_that_is_no_text_fails_alone(tmp_path: Path, name: str) -> None:
    platform = Platform(seed=3)
    lines = [b"%d" % i for i in range(3000)]
    lines[0] = lines[778] = lines[2999] = b"caf\xe9"
    (path := tmp_path / "lines.txt").write_bytes(b"\n".join(lines))
    spec = submitted(platform, name, Lines(path))

    facts = platform.run(spec)

    assert (facts["done"], facts["failed"]) == ("2997", "3")
    assert platform.output(spec) == [str(i) for i in range(3000) if i not in (0, 778, 2999)]
    failures = platform.ledger.failures(spec.job)
    assert [(each.index, each.type) for each in failures] == [
        (index, "UnicodeDecodeError") for index in (0, 778, 2999)
    ]


@pytest.mark.parametrize("lost", [range(1024, 2048), range(3000)])
def test_items_of_lost_blocks_fail_and_the_others_run(lost: range) -> None:
    platform = Platform(seed=4)
    spec = submitted(platform, "unit_collects_batch", [str(i) for i in range(3000)])
    keys = platform.keys.of(spec.job)
    for start in range(0, 3000, 1024):
        if start in lost:
            platform.store.client.hdel(keys.blocks, f"{start}:{min(start + 1024, 3000)}")

    facts = platform.run(spec)

    assert (facts["done"], facts["failed"]) == (str(3000 - len(lost)), str(len(lost)))
    assert platform.output(spec) == [str(i) for i in range(3000) if i not in lost]
    assert "not stored any more" in platform.ledger.failures(spec.job)[0].message


def test_items_that_cannot_be_validated_are_not_counted_twice(tmp_path: Path) -> None:
    platform, path = Platform(seed=5), file_of(tmp_path, 5000)
    spec = submitted(
        platform,
        "unit_collects",
        Lines(path),
        conditions=Conditions(validate_before_process=True),
        strategy=NWay(split_factor=7, min_chunk_size=10),
    )
    mended = path.stat()
    path.write_text("mended\n")
    while platform.ledger.facts(spec.job)["phase"] == "validate":
        platform.step()
    file_of(tmp_path, 5000)
    os.utime(path, ns=(mended.st_atime_ns, mended.st_mtime_ns))

    facts = platform.run(spec)

    assert (facts["done"], facts["failed"], facts["skipped"]) == ("0", "5000", "0")
    assert platform.ledger.failed_items(spec.job) == list(range(5000))


def test_skipped_ranges_do_not_count_items_that_failed_in_validation(tmp_path: Path) -> None:
    platform, path = Platform(seed=6), file_of(tmp_path, 5000)
    spec = submitted(
        platform,
        "unit_collects",
        Lines(path),
        conditions=Conditions(validate_before_process=True),
    )
    path.write_text("mended\n")
    while platform.ledger.facts(spec.job)["phase"] == "validate":
        platform.step()

    platform.ledger.stop(spec.job, "cancelled", force=True)

    facts = platform.run(spec)
    assert (facts["state"], facts["failed"], facts["skipped"]) == ("cancelled", "5000", "0")


def test_a_node_reports_many_failures_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform()
    (path := tmp_path / "lines.txt").write_bytes(b"good\n\xff\n" * 10_000)
    spec = submitted(platform, "unit_collects", Lines(path), type="sequential")
    reports: list[Report] = []
    finish = platform.ledger.finish

    def spy(claim: Any, report: Report, *more: Any, **named: Any) -> Finished:
        reports.append(report)
        return finish(claim, report, *more, **named)

    monkeypatch.setattr(platform.ledger, "finish", spy)

    facts = platform.run(spec)

    assert (facts["done"], facts["failed"]) == ("10000", "10000")
    sizes = [len(each.failed) + len(each.failed_ranges) for each in reports]
    assert max(sizes) == FAILURES_FULL_AT


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unit_collects", "unit_collects_batch", "unit_collects_async"])
def test_a_node_ends_when_its_outputs_hold_too_much_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(namespace="unit", node={"output_mb": 0.25})
    platform = Platform(settings=settings)
    monkeypatch.setattr(platform.clock, "now", 0.0)
    (path := tmp_path / "lines.txt").write_bytes((b"x" * 2000 + b"\n") * 3000)
    spec = submitted(platform, name, Lines(path), type="sequential")
    partials: list[int] = []
    finish = platform.ledger.finish

    def spy(claim: Any, report: Report, *more: Any, **named: Any) -> Finished:
        partials.append(report.done * 2000)
        return finish(claim, report, *more, **named)

    monkeypatch.setattr(platform.ledger, "finish", spy)

    facts = platform.run(spec)

    assert facts["done"] == "3000"
    assert max(partials) < 3 * 2**20, "a window of 1,024 items more than the bound"
    assert len(partials) >= 3


def test_the_blocks_of_a_job_are_forgotten_with_its_last_node() -> None:
    platform = Platform()
    spec = submitted(platform, "unit_collects", [f"{i}" for i in range(5000)])

    platform.run(spec)

    assert platform.runtime.items.held_bytes == 0


def test_items_of_an_open_job_live_longer_than_staged_ones() -> None:
    platform = Platform()
    keys = platform.keys.of(submitted(platform, "unit_collects", ["text"]).job)

    lives = [platform.store.client.ttl(key) for key in (keys.items, keys.blocks)]
    assert min(lives) > STAGED_S
