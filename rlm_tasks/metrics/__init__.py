"""Counters of a worker: the classes that declare them, and the files that its processes count in.

The engine, `llm` and users' modules declare metrics with it; `telemetry` exposes them.  Begin with
`declared`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlm_tasks.lazy import lazy

if TYPE_CHECKING:
    from rlm_tasks.metrics.declared import Counter as Counter
    from rlm_tasks.metrics.declared import Histogram as Histogram
    from rlm_tasks.metrics.declared import Metric as Metric
    from rlm_tasks.metrics.declared import Peak as Peak
    from rlm_tasks.metrics.declared import counted as counted
    from rlm_tasks.metrics.declared import timed as timed

_HOMES = {
    "rlm_tasks.metrics.declared": "Counter Histogram Metric Peak counted timed",
}
__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
