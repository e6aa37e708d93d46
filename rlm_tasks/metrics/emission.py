"""The counters that a request adds to when its job has succeeded."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.metrics.declared import DECLARED, Counter

logger = logging.getLogger(__name__)
Told = Mapping[str, float | str]


def emission(told: Told) -> list[tuple[Counter, float, dict[str, str]]]:
    """Return the counters that a request's numbers are for, with what is added to each, and its
    labels.

    ``business.records`` is the counter ``business_records_total``; a text is the label of its
    name.  Raises InvalidRequest for a counter that no module has declared, and for labels that it
    does not have."""
    labels = {
        name.replace(".", "_"): value for name, value in told.items() if isinstance(value, str)
    }
    found = []
    for name, amount in told.items():
        if isinstance(amount, str):
            continue
        total = f"{name.replace('.', '_')}_total"
        counter = DECLARED.get(total)
        if not isinstance(counter, Counter) or total.startswith("rlm_"):
            raise InvalidRequest(
                "emit_metrics", name, f"declare it beside your operations: Counter({total!r}, ...)"
            )
        if amount < 0 or labels.keys() != counter.labels.keys():
            raise InvalidRequest(
                "emit_metrics",
                dict(told),
                f"{name} only grows, by labels {', '.join(counter.labels) or 'none'}",
            )
        found.append((counter, amount, labels))
    return found


def emit(told: Told) -> None:
    """Count what the request of a job says, now that it has succeeded."""
    try:
        for counter, amount, labels in emission(told):
            counter.inc(amount, **labels)
    except InvalidRequest as error:
        logger.warning(
            "Not counted, its declaration is another here than where it was submitted: %s", error
        )
