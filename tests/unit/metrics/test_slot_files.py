"""The metric files of slots."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from rlm_tasks.ledger.records import Report
from rlm_tasks.metrics import slot_files
from rlm_tasks.metrics.declared import Counter
from rlm_tasks.metrics.slot_files import SlotFiles
from tests.unit.exposed_metrics import REPORT, ExposedMetrics, count, exposed, folder

__all__ = ["exposed", "folder"]

RECORDS = Counter("unit_records_total", "Records.", {"domain": ("analytics", "billing")})


def test_the_next_process_of_a_slot_continues_in_the_same_files(
    folder: Path, exposed: ExposedMetrics
) -> None:
    count(REPORT)
    slot_files.begin(folder)  # as the next process of the slot does
    count(REPORT)

    assert exposed["rlm_items_total"]["operation=sum,outcome=done"] == 180
    assert exposed["rlm_node_duration_seconds_count"] == {"operation=sum": 2}
    assert len(list(folder.iterdir())) == 3


def test_the_counts_of_all_slots_are_summed(
    folder: Path, exposed: ExposedMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot, peak_kb in (("0", 2048), ("1", 4096), ("2", 1024)):
        monkeypatch.setattr(slot_files, "_slot", lambda slot=slot: slot)
        slot_files.begin(folder)
        count(Report(mid=100, done=100, peak_kb=peak_kb))

    assert exposed["rlm_items_total"] == {"operation=sum,outcome=done": 300}
    assert exposed["rlm_peak_memory_mb"] == {"": 4.0}
    assert len(list(folder.iterdir())) == 9


def test_a_reader_never_sees_an_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[list[Path]] = []
    stock = Path.replace
    monkeypatch.setattr(
        Path,
        "replace",
        lambda path, to: (met.append(list(tmp_path.glob("*.db"))), stock(path, to))[1],
    )
    files = SlotFiles(tmp_path)
    files.add("counter", ("key", 1.0))
    files.close()

    assert met == [[]]
    assert [each.name for each in tmp_path.iterdir()] == ["counter_main.db"]


def test_outside_of_a_worker_nothing_is_counted(tmp_path: Path) -> None:
    exposed = ExposedMetrics(tmp_path)
    count(REPORT)
    RECORDS.inc(domain="billing")

    assert exposed["rlm_items_total"] == exposed["unit_records_total"] == {}


def test_a_missing_folder_stops_the_counting_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slot_files.begin(tmp_path / "gone")
    count(REPORT)
    count(REPORT)

    assert [record.message[:50] for record in caplog.records] == [
        "This process counts no more, its metrics cannot be"
    ]


# --- the values of labels, over all processes -------------------------------------------------


def count_customers(folder: Path, slot: int) -> None:
    """Count as the process of a slot: most customers are known to one process only."""
    slot_files._slot = lambda: str(slot)
    slot_files.begin(folder)
    for number in range(60):
        CUSTOMERS.inc(customer=f"shared-{number}" if number < 10 else f"of-{slot}-{number}")
    slot_files.end()


CUSTOMERS = Counter("unit_slot_customers_total", "By customer.", {"customer": None})


def test_all_processes_of_a_worker_share_the_values_of_a_label(
    folder: Path, exposed: ExposedMetrics
) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_customers, args=(folder, slot)) for slot in range(4)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
        assert each.exitcode == 0

    series = exposed["unit_slot_customers_total"]
    assert sum(series.values()) == 4 * 60
    assert len(series) == 101
    dropped = exposed["rlm_metric_series_dropped_total"]["metric=unit_slot_customers_total"]
    assert (
        series["customer=other"]
        == dropped
        == 4 * 60 - sum(value for labels, value in series.items() if labels != "customer=other")
    )


def test_the_next_process_of_a_slot_knows_the_values_of_the_last_one(
    folder: Path, exposed: ExposedMetrics
) -> None:
    for first in (0, 80):
        slot_files.begin(folder)
        for number in range(first, first + 80):
            CUSTOMERS.inc(customer=f"c{number}")

    series = exposed["unit_slot_customers_total"]
    assert (len(series), series["customer=other"]) == (101, 60)
