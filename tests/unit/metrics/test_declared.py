"""What a worker counts, what it tells of itself, and when it counts as alive and ready."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resilience.errors import InvalidValue
from rlm_tasks.engine.counts import count_node
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.installation import install
from rlm_tasks.jobs.splitting import Reason
from rlm_tasks.ledger.records import Child, Report
from rlm_tasks.metrics import emission, slot_files
from rlm_tasks.metrics.declared import DECLARED, Counter, Histogram, Labels, counted, timed
from rlm_tasks.metrics.slot_files import SlotFiles
from rlm_tasks.requests import Options
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry import exposition
from rlm_tasks.telemetry.exposition import WorkerState
from rlm_tasks.telemetry.worker_port import STUCK_S, UNHEARD_S, Vitals, not_alive, not_ready

ROOT = Path(__file__).parents[3]
IDLE = WorkerState(total=4, busy=0, draining=False, level=0, memory_mb=100.0, memory_level=0)
REPORT = Report(
    mid=100,
    done=90,
    failed=[1, 2, 3, 4, 5, 6],
    skipped=[7, 8, 9, 10],
    busy_us=480_000,
    peak_kb=2048,
)
RECORDS = Counter("unit_records_total", "Records.", {"domain": ("analytics", "billing")})
SIZES = Histogram("unit_sizes", "Sizes.", buckets=(1, 10))


class Seen:
    """What is exposed of a folder: samples by name and labels."""

    def __init__(self, folder: Path) -> None:
        self.standing, self.now = IDLE, 0.0
        self._registry = exposition.registry(folder, lambda: self.standing, lambda: self.now)

    def families(self) -> set[str]:
        """Return the names in TYPE lines."""
        return set(
            re.findall(r"^# TYPE (\S+)", generate_latest(self._registry).decode(), re.MULTILINE)
        )

    def __getitem__(self, sample: str) -> dict[str, float]:
        families = text_string_to_metric_families(generate_latest(self._registry).decode())
        found = [each for family in families for each in family.samples if each.name == sample]
        return {
            ",".join(f"{name}={value}" for name, value in sorted(each.labels.items())): each.value
            for each in found
        }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process counts in."""
    slot_files.begin(tmp_path)
    yield tmp_path
    slot_files.end()


@pytest.fixture
def seen(folder: Path) -> Seen:
    """What is exposed of it."""
    return Seen(folder)


def count(
    report: Report,
    *,
    hi: int = 100,
    recovered: int = 0,
    given_up: int = 0,
    validating: bool = False,
) -> None:
    count_node(
        "sum", report, hi, took_s=0.5, recovered=recovered, given_up=given_up, validating=validating
    )


# --- nodes ------------------------------------------------------------------------------------


def test_a_node_counts_its_items_by_outcome_and_their_mean_time_for_each_that_ran(
    seen: Seen,
) -> None:
    count(REPORT)

    assert seen["rlm_items_total"] == {
        "operation=sum,outcome=done": 90,
        "operation=sum,outcome=failed": 6,
        "operation=sum,outcome=skipped": 4,
    }
    assert seen["rlm_nodes_total"] == {"operation=sum,reason=done": 1}
    assert seen["rlm_item_busy_seconds_total"] == {"operation=sum": 0.48}
    assert seen["rlm_execution_time_ms_count"] == {"operation=sum": 96}
    assert seen["rlm_execution_time_ms_sum"] == {"operation=sum": 480}
    buckets = seen["rlm_execution_time_ms_bucket"]
    assert (buckets["le=1.0,operation=sum"], buckets["le=5.0,operation=sum"]) == (0, 96)
    assert seen["rlm_node_duration_seconds_sum"] == {"operation=sum": 0.5}
    assert seen["rlm_peak_memory_mb"] == {"": 2.0}


def test_what_is_validated_only_is_not_done_but_may_have_failed(seen: Seen) -> None:
    count(REPORT, validating=True)

    assert seen["rlm_items_total"] == {"operation=sum,outcome=failed": 6}
    assert seen["rlm_item_busy_seconds_total"] == {}


@pytest.mark.parametrize("reason", Reason)
def test_a_node_that_hands_over_tells_why(seen: Seen, reason: Reason) -> None:
    rest = [Child("k", 100, 200, 0, "", 0, "", reason)]
    count(Report(mid=100, done=100, kids=rest, why=reason), hi=200)
    count(Report(mid=200, done=100, why=reason), hi=200)

    assert seen["rlm_nodes_total"] == {
        f"operation=sum,reason={reason.name.lower()}": 1,
        "operation=sum,reason=done": 1,
    }


def test_retried_items_are_counted_by_their_end_and_give_the_recovery_rate(seen: Seen) -> None:
    assert seen["rlm_recovery_success_rate"] == {}
    count(REPORT, recovered=3, given_up=1)

    assert seen["rlm_retries_total"] == {
        "operation=sum,outcome=recovered": 3,
        "operation=sum,outcome=given_up": 1,
    }
    assert seen["rlm_recovery_success_rate"] == {"": 0.75}


def test_the_error_rate_is_that_of_the_last_five_minutes(seen: Seen) -> None:
    assert seen["rlm_error_rate"] == {"": 0.0}
    count(Report(mid=100, done=50, failed=list(range(50))))
    seen.now = 60.0
    assert seen["rlm_error_rate"] == {"": 0.5}
    seen.now = 200.0
    count(Report(mid=100, done=100))
    assert seen["rlm_error_rate"] == {"": 0.25}
    seen.now = 370.0
    assert seen["rlm_error_rate"] == {"": 0.0}, "the failures are older than five minutes"


def test_a_cache_is_told_by_its_hits_and_misses(seen: Seen) -> None:
    assert seen["rlm_cache_hit_rate"] == {}
    count_node("sum", REPORT, 100, took_s=0.5, cache=(9, 1))

    assert seen["rlm_cache_reads_total"] == {"outcome=hit": 9, "outcome=miss": 1}
    assert seen["rlm_cache_hit_rate"] == {"": 0.9}


def test_a_request_counts_what_it_says_in_declared_counters(seen: Seen) -> None:
    options = Options(emitMetrics={"unit.records": 12, "domain": "billing"})
    emission.emit(options.emit_metrics)

    assert seen["unit_records_total"] == {"domain=billing": 12}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"unit.recrods": 1}, "emit_metrics='unit.recrods': declare it beside your operations"),
        ({"rlm.items": 1}, "emit_metrics='rlm.items': declare it beside your operations"),
        ({"unit.records": 1}, "unit.records only grows, by labels domain"),
        ({"unit.records": -1, "domain": "billing"}, "unit.records only grows, by labels domain"),
    ],
)
def test_a_request_that_would_count_elsewhere_is_refused(
    told: dict[str, float | str], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Options(emit_metrics=told)


# --- slots ------------------------------------------------------------------------------------


def test_the_process_that_comes_after_goes_on_counting_in_the_same_files(
    folder: Path, seen: Seen
) -> None:
    count(REPORT)
    slot_files.begin(folder)  # as the next process of the slot does
    count(REPORT)

    assert seen["rlm_items_total"]["operation=sum,outcome=done"] == 180
    assert seen["rlm_node_duration_seconds_count"] == {"operation=sum": 2}
    assert len(list(folder.iterdir())) == 3


def test_slots_count_side_by_side_and_are_one_number(
    folder: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot, peak_kb in (("0", 2048), ("1", 4096), ("2", 1024)):
        monkeypatch.setattr(slot_files, "_slot", lambda slot=slot: slot)
        slot_files.begin(folder)
        count(Report(mid=100, done=100, peak_kb=peak_kb))

    assert seen["rlm_items_total"] == {"operation=sum,outcome=done": 300}
    assert seen["rlm_peak_memory_mb"] == {"": 4.0}
    assert len(list(folder.iterdir())) == 9


def test_a_reader_never_meets_a_file_that_is_being_made(
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
    seen = Seen(tmp_path)
    count(REPORT)
    RECORDS.inc(domain="billing")

    assert seen["rlm_items_total"] == seen["unit_records_total"] == {}


def test_a_folder_that_is_gone_stops_the_counting_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slot_files.begin(tmp_path / "gone")
    count(REPORT)
    count(REPORT)

    assert [record.message[:50] for record in caplog.records] == [
        "This process counts no more, its metrics cannot be"
    ]


# --- a user's own -----------------------------------------------------------------------------


def test_a_value_that_was_not_declared_is_counted_as_another(seen: Seen) -> None:
    for domain in ("analytics", "billing", "billing", "user-4711", "user-4712"):
        RECORDS.inc(2, domain=domain)

    assert seen["unit_records_total"] == {
        "domain=analytics": 2,
        "domain=billing": 4,
        "domain=other": 4,
    }


def test_a_histogram_shows_all_its_buckets_from_the_first_value_on(seen: Seen) -> None:
    SIZES.observe(10)
    SIZES.observe(11, times=3)

    assert seen["unit_sizes_bucket"] == {"le=1.0": 0, "le=10.0": 1, "le=+Inf": 4}
    assert (seen["unit_sizes_sum"], seen["unit_sizes_count"]) == ({"": 43}, {"": 4})


@pytest.mark.parametrize(
    ("labels", "amount", "told"),
    [
        ({}, 1, r"labels=\[\]: unit_records_total has the labels domain"),
        (
            {"domain": "a", "job": "b"},
            1,
            r"labels=\['domain', 'job'\]: unit_records_total has the labels domain",
        ),
        ({"domain": "billing"}, -1, "amount=-1: unit_records_total is a counter: it only grows"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    labels: Mapping[str, str], amount: float, told: str
) -> None:
    with pytest.raises(InvalidValue, match=told):
        RECORDS.inc(amount, **labels)


@pytest.mark.parametrize(
    ("name", "labels", "told"),
    [
        ("unit_records", {}, "a counter's name ends in _total"),
        ("unit.records_total", {}, "must be letters, digits and underscores"),
        ("unit_more_total", {"the domain": ("a",)}, "must be letters, digits and underscores"),
        ("unit_records_total", {"domain": ("shop",)}, "is declared already"),
        ("rlm_items_total", {}, "is declared already"),
    ],
)
def test_what_cannot_be_declared_is_refused(name: str, labels: Labels, told: str) -> None:
    with pytest.raises(InvalidValue, match=told):
        Counter(name, "Records.", labels)


def test_a_module_that_is_imported_twice_declares_the_same_metric(seen: Seen) -> None:
    again = Counter("unit_records_total", "Records.", {"domain": ("analytics", "billing")})
    RECORDS.inc(domain="billing")
    again.inc(domain="billing")

    assert seen["unit_records_total"] == {"domain=billing": 2}


def test_functions_are_counted_and_timed_also_when_they_raise(seen: Seen) -> None:
    @counted("unit_orders_total", "Orders.")
    @timed("unit_order_seconds", "How long orders take.")
    def order(number: int) -> int:
        """Order."""
        return 10 // number

    @counted("unit_mails_total", "Mails.")
    async def mail(number: int) -> float:
        await asyncio.sleep(0)
        return 10 / number

    assert (order(5), asyncio.run(mail(5)), order.__doc__) == (2, 2.0, "Order.")
    for failing in (lambda: order(0), lambda: asyncio.run(mail(0))):
        with pytest.raises(ZeroDivisionError):
            failing()

    assert (
        seen["unit_orders_total"]
        == seen["unit_mails_total"]
        == {"outcome=ok": 1, "outcome=error": 1}
    )
    assert seen["unit_order_seconds_count"] == {"": 2}


def test_the_folder_of_the_owner_s_own_multiprocess_mode_is_exposed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(theirs), "PYTHONPATH": str(ROOT)}
    count_theirs = (
        "from prometheus_client import Counter; Counter('theirs_total', 'Theirs.').inc(7)"
    )
    subprocess.run([sys.executable, "-c", count_theirs], env=environment, check=True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(theirs))

    assert Seen(ours)["theirs_total"] == {"": 7}


# --- what is told of the worker ---------------------------------------------------------------


def test_gauges_tell_how_the_worker_stands(seen: Seen) -> None:
    breakers = {"llm": "open", "mail": "half-open", "search": "closed"}
    seen.standing = WorkerState(
        total=4,
        busy=3,
        draining=False,
        level=2,
        memory_mb=512.5,
        memory_level=1,
        breakers=breakers,
    )

    assert seen["rlm_slots"] == {"state=busy": 3, "state=free": 1}
    assert seen["rlm_concurrency_level"] == {"": 3}
    assert seen["rlm_object_pool_utilization"] == {"": 0.75}
    assert seen["rlm_memory_usage_mb"] == {"": 512.5}
    assert seen["rlm_memory_pressure_level"] == {"": 1}
    assert seen["rlm_pressure_level"] == {"": 2}
    assert seen["rlm_circuit_breaker_state"] == {
        "service=llm": 2,
        "service=mail": 1,
        "service=search": 0,
    }
    assert seen["rlm_draining"] == {"": 0}


def test_a_worker_that_drains_or_has_no_pool_has_nothing_free(seen: Seen) -> None:
    seen.standing = replace(IDLE, draining=True, memory_level=None)
    assert (seen["rlm_slots"]["state=free"], seen["rlm_draining"][""]) == (0, 1)
    assert seen["rlm_memory_pressure_level"] == {}, "it could not be measured"

    seen.standing = replace(IDLE, total=0)
    assert (seen["rlm_slots"]["state=free"], seen["rlm_object_pool_utilization"][""]) == (0, 0)


WELL = Vitals(guard_s=0.5, loop_s=1.0, ledger_s=0.5, consuming=True, draining=False)


@pytest.mark.parametrize(
    ("vitals", "alive", "ready"),
    [
        (WELL, "", ""),
        (replace(WELL, draining=True), "", "it drains"),
        (
            replace(WELL, consuming=False),
            "",
            "it is not connected to its broker, or does not consume yet",
        ),
        (replace(WELL, ledger_s=UNHEARD_S + 1), "", "the ledger has not answered for 6 s"),
        (
            replace(WELL, loop_s=STUCK_S + 1),
            "its event loop has been stuck for 121 s",
            "its event loop has been stuck for 121 s",
        ),
        (
            replace(WELL, guard_s=STUCK_S + 1),
            "its guard has been stuck for 121 s",
            "its guard has been stuck for 121 s",
        ),
        (
            replace(WELL, guard_s=float("inf")),
            "its guard has been stuck for inf s",
            "its guard has been stuck for inf s",
        ),
    ],
)
def test_a_worker_is_alive_while_its_parts_move_and_ready_while_it_takes_work(
    vitals: Vitals, alive: str, ready: str
) -> None:
    assert (not_alive(vitals), not_ready(vitals)) == (alive, ready)


# --- where it stands --------------------------------------------------------------------------


def test_the_page_lists_every_metric_with_its_labels(seen: Seen) -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(rlm_\w+)(?:\{(.*?)\})?`", page, re.MULTILINE))

    assert {name.removesuffix("_total") for name in listed} == {
        name.removesuffix("_total") for name in seen.families() if name.startswith("rlm_")
    }
    declared = {
        name: ",".join(each.labels) for name, each in DECLARED.items() if name.startswith("rlm_")
    }
    assert {name: listed[name] for name in declared} == declared


def test_every_metric_of_source_document_2_has_its_name() -> None:
    named = "object_pool_utilization memory_usage_mb memory_pressure_level execution_time_ms cache_hit_rate concurrency_level error_rate"
    named += " circuit_breaker_state recovery_success_rate"

    assert {f"rlm_{each}" for each in named.split()} <= {*exposition.GAUGES, *DECLARED}


def test_every_app_s_workers_have_the_option() -> None:
    app = install(Celery("somebody-s", set_as_current=False), Settings())

    [option] = [each for each in app.user_options["worker"] if each.name == "metrics_port"]
    assert (option.default, Settings().metrics.address) == (8000, "127.0.0.1")


def test_clients_do_without_the_server_and_prometheus() -> None:
    code = "import sys, rlm_tasks.client.client; print([each for each in ('prometheus_client', 'wsgiref') if each in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"
