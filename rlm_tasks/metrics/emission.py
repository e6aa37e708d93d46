"""The counters to which a request adds when its job has succeeded (`emit_metrics`).

Submission checks the amounts with `emission`; the merge that closes the job calls `emit`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.metrics.declared import DECLARED, Counter

logger = logging.getLogger(__name__)
Amounts = Mapping[str, float | str]
"""`emit_metrics` of a request: amounts by metric, and texts by label."""


def emission(amounts: Amounts) -> list[tuple[Counter, float, dict[str, str]]]:
    """Return each counter of a request with the amount to add and the labels.

    ``business.records`` is the counter ``business_records_total``; a text is the label of its
    name.  Raises InvalidRequest for a counter that no module has declared, and for labels that it
    does not have.
    """
    labels = {
        name.replace(".", "_"): value for name, value in amounts.items() if isinstance(value, str)
    }
    additions = []
    for name, amount in amounts.items():
        if isinstance(amount, str):
            continue
        total = f"{name.replace('.', '_')}_total"
        counter = DECLARED.get(total)
        if not isinstance(counter, Counter) or total.startswith("rlm_"):
            raise InvalidRequest(
                "emit_metrics", name, f"declare it beside your operations: Counter({total!r}, ...)"
            )
        if not 0 <= amount <= sys.float_info.max or labels.keys() != counter.labels.keys():
            raise InvalidRequest(
                "emit_metrics",
                dict(amounts),
                f"{name} needs 0 or more, and the labels {', '.join(counter.labels) or 'none'}",
            )
        additions.append((counter, amount, labels))
    return additions


def emit(amounts: Amounts) -> None:
    """Add the amounts of a job's request to their counters; an undeclared one is logged."""
    try:
        for counter, amount, labels in emission(amounts):
            counter.inc(amount, **labels)
    except InvalidRequest as error:
        logger.warning(
            "A metric of a job is not counted, because this worker declares it differently from "
            "the job's client: %s",
            error,
        )
