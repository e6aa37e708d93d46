"""ENABLE_DYNAMIC_SCALING: with it, batches, pools and the number of workers follow the load."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.degradation import Level
from rlm_tasks.settings.model import Settings
from rlm_tasks.worker.autoscaler import PressureAutoscaler
from scheduler.monitor import MonitorSettings
from scheduler.queues import QueueReport
from scheduler.settings import AdmissionSettings, AutoscaleSettings
from tests.unit.client.test_admission import AdmissionClient
from tests.unit.scheduler.test_monitor import MonitoredPlatform
from tests.unit.world import World, world

__all__ = ["world"]


@pytest.fixture(params=["1", "0"])
def follows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether scaling follows the load, as the variable sets it."""
    monkeypatch.setenv("ENABLE_DYNAMIC_SCALING", request.param)
    return bool(int(request.param))


def test_the_size_of_batches(follows: bool, world: World) -> None:
    admission = AdmissionClient(world)
    admission.host(Level.NORMAL)
    admission.answer("normal")

    assert admission.check.batch_size() == (100 if follows else 50), "CPU and memory are below half"


class Pool:
    """A pool whose processes start at once."""

    def __init__(self, processes: int) -> None:
        self.active, self.num_processes = True, processes

    def grow(self, n: int) -> None:
        self.num_processes += n


def test_the_size_of_pools(follows: bool) -> None:
    page = SimpleNamespace(level=Level.HIGH)
    app = SimpleNamespace(
        rlm_settings=Settings(),
        rlm_runtime=lambda: SimpleNamespace(page=page, clock=time.monotonic),
        rlm_queued=lambda: 9,
    )
    consumer = SimpleNamespace(_update_prefetch_count=lambda _: None)
    pool: Any = Pool(2)
    scaler = PressureAutoscaler(pool, 8, 2, worker=SimpleNamespace(app=app, consumer=consumer))

    scaler._maybe_scale()

    assert pool.num_processes == (2 if follows else 8), "at high pressure no pool grows"


def test_the_number_of_workers(follows: bool, world: World) -> None:
    platform = MonitoredPlatform(world)
    platform.queues["unit.low"] = QueueReport(5000)
    monitor, _ = platform.monitor()
    monitor._settings = MonitorSettings(
        platform.settings, AdmissionSettings(), Settings().autoscale
    )

    report = platform.look(monitor)

    assert Settings().autoscale == AutoscaleSettings(enabled=follows)
    assert (report.desired_workers, bool(platform.events("scaling.advised"))) == (
        (2, True) if follows else (0, False)
    )
