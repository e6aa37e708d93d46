"""Metrics that users declare: counters, histograms, and the decorators `counted` and `timed`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from resilience.errors import InvalidValue
from rlm_tasks.metrics.declared import Counter, Histogram, Labels, counted, timed
from tests.unit.exposed_metrics import ExposedMetrics, exposed, folder

__all__ = ["exposed", "folder"]

RECORDS = Counter("unit_records_total", "Records.", {"domain": ("analytics", "billing")})
SIZES = Histogram("unit_sizes", "Sizes.", buckets=(1, 10))


# --- declared metrics -------------------------------------------------------------------------


def test_a_label_value_that_was_not_declared_counts_as_other(exposed: ExposedMetrics) -> None:
    for domain in ("analytics", "billing", "billing", "user-4711", "user-4712"):
        RECORDS.inc(2, domain=domain)

    assert exposed["unit_records_total"] == {
        "domain=analytics": 2,
        "domain=billing": 4,
        "domain=other": 4,
    }


def test_a_histogram_has_all_its_buckets_from_the_first_value_on(exposed: ExposedMetrics) -> None:
    SIZES.observe(10)
    SIZES.observe(11, times=3)

    assert exposed["unit_sizes_bucket"] == {"le=1.0": 0, "le=10.0": 1, "le=+Inf": 4}
    assert (exposed["unit_sizes_sum"], exposed["unit_sizes_count"]) == ({"": 43}, {"": 4})


@pytest.mark.parametrize(
    ("labels", "amount", "message"),
    [
        ({}, 1, r"labels=\[\]: unit_records_total has the labels domain"),
        (
            {"domain": "a", "job": "b"},
            1,
            r"labels=\['domain', 'job'\]: unit_records_total has the labels domain",
        ),
        ({"domain": "billing"}, -1, "amount=-1: unit_records_total is a counter; add 0 or more"),
    ],
)
def test_wrong_labels_and_amounts_are_refused(
    labels: Mapping[str, str], amount: float, message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        RECORDS.inc(amount, **labels)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("unit_records", {}, "a counter's name must end in _total"),
        ("unit.records_total", {}, "must be letters, digits and underscores"),
        ("unit_more_total", {"the domain": ("a",)}, "must be letters, digits and underscores"),
        ("unit_records_total", {"domain": ("shop",)}, "is declared already"),
        ("rlm_items_total", {}, "is declared already"),
    ],
)
def test_wrong_declarations_are_refused(name: str, labels: Labels, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Counter(name, "Records.", labels)


def test_a_module_that_is_imported_twice_declares_the_same_metric(exposed: ExposedMetrics) -> None:
    again = Counter("unit_records_total", "Records.", {"domain": ("analytics", "billing")})
    RECORDS.inc(domain="billing")
    again.inc(domain="billing")

    assert exposed["unit_records_total"] == {"domain=billing": 2}


def test_functions_are_counted_and_timed_even_when_they_raise(exposed: ExposedMetrics) -> None:
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
        exposed["unit_orders_total"]
        == exposed["unit_mails_total"]
        == {"outcome=ok": 1, "outcome=error": 1}
    )
    assert exposed["unit_order_seconds_count"] == {"": 2}


# --- labels without declared values -----------------------------------------------------------

CUSTOMERS = Counter("unit_customers_total", "Orders by customer.", {"customer": None})
WAITS = Histogram(
    "unit_waits", "Waits by customer.", {"customer": None}, buckets=(1, 10), most_values=3
)


def test_a_free_label_has_a_hundred_values_and_the_sum_stays_right(
    exposed: ExposedMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        for number in range(1500):
            CUSTOMERS.inc(2, customer=f"c{number}")

    series = exposed["unit_customers_total"]
    assert len(series) == 101
    assert sum(series.values()) == 2 * 2 * 1500
    assert series["customer=c0"] == series["customer=c99"] == 4
    assert series["customer=other"] == 2 * 2 * 1400
    assert exposed["rlm_metric_series_dropped_total"] == {"metric=unit_customers_total": 2800}
    assert [each.message for each in caplog.records] == [
        "The label customer of unit_customers has 100 values, its most; others count together"
    ]


def test_a_histogram_bounds_its_series_as_well(exposed: ExposedMetrics) -> None:
    for number in range(10):
        WAITS.observe(number, customer=f"c{number}")

    assert exposed["unit_waits_count"] == {
        "customer=c0": 1,
        "customer=c1": 1,
        "customer=c2": 1,
        "customer=other": 7,
    }
    assert sum(exposed["unit_waits_sum"].values()) == sum(range(10))


def test_each_of_several_labels_has_its_own_bound(exposed: ExposedMetrics) -> None:
    visits = Counter(
        "unit_visits_total",
        "Visits.",
        {"page": None, "kind": ("new", "back"), "user": None},
        most_values=2,
    )
    for page, kind, user in (
        ("a", "new", "u1"),
        ("b", "back", "u2"),
        ("a", "new", "u3"),
        ("c", "odd", "u1"),
        ("other", "new", "other"),
    ):
        visits.inc(page=page, kind=kind, user=user)

    assert exposed["unit_visits_total"] == {
        "kind=new,page=a,user=u1": 1,
        "kind=back,page=b,user=u2": 1,
        "kind=new,page=a,user=other": 1,
        "kind=other,page=other,user=u1": 1,
        "kind=new,page=other,user=other": 1,
    }
    assert exposed["rlm_metric_series_dropped_total"] == {"metric=unit_visits_total": 2}


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(InvalidValue, match="most_values=0: must be above 0"):
        Counter("unit_bounded_total", "Bounded.", {"page": None}, most_values=0)
