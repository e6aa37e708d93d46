"""An operation on a real worker becomes slower: events, an alert and the status report it.

Another event reports the recovery."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from rlm_tasks import Client
from rlm_tasks.cli import rlm
from rlm_tasks.testing import embedded
from scheduler.alerts import Alert
from scheduler.snapshots import MIN_ITEMS, MIN_PAST, RECENT
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until


class Watched:
    """A platform without beat; the test triggers a measurement after each job."""

    def __init__(self, client: Client, speed: Path) -> None:
        self.client, self._speed = client, speed

    def run(self, ms: float, jobs: int = 1) -> None:
        """Run jobs whose items take `ms`; wait for a snapshot after each."""
        self._speed.write_text(str(ms))
        for _ in range(jobs):
            known = self._latest()
            self.client.execute(
                operation="as_slow_as", items=[str(self._speed)] * MIN_ITEMS, timeout=30
            )
            wait_until(lambda known=known: self._measure() != known)  # type: ignore[misc]  # bound now

    def events(self) -> list[str]:
        """Return the names of performance events, the oldest first."""
        return [each.name for each in self.client.events.recent(100, "performance.*")][::-1]

    def alerts(self) -> list[Alert]:
        """Return the alerts of a degraded performance."""
        return [
            each for each in self.client.alerts.history() if each.kind == "performance.degraded"
        ]

    def _latest(self) -> float:
        return max((each.at for each in self.client.snapshots("as_slow_as")), default=0.0)

    def _measure(self) -> float:
        self.client.app.control.broadcast("rlm_monitor")  # beat sends this, too
        return self._latest()


@pytest.fixture(scope="module")
def watched(
    server: embedded.Server, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    environment = environment_of(
        server.url,
        "windows",
        RLM_OPERATIONS="tests.integration.windows_ops",
        RLM_GUARD_TIMEOUT_S="5",
        RLM_PRESSURE__MONITOR_S="0.05",
        RLM_SNAPSHOTS__EVERY_S="0.01",
        RLM_SNAPSHOTS__THRESHOLD="1",
    )
    with embedded.worker(environment, log=logs / "windows.log"), client_of(environment) as client:
        yield Watched(client, tmp_path_factory.mktemp("windows") / "ms")


def test_a_slower_operation_causes_events_and_an_alert(watched: Watched) -> None:
    client = watched.client
    watched.run(4.0, jobs=MIN_PAST + RECENT)
    assert watched.events() == []
    while not watched.events():
        watched.run(20.0)

    assert watched.events() == ["performance.degraded"]
    wait_until(lambda: bool(watched.alerts()))  # it follows its event
    [alert] = watched.alerts()
    assert (alert.subject, alert.severity.label) == ("as_slow_as", "warning")
    [operation] = client.status().operations
    assert (operation["slower"], operation["change_percent"] > 100) == (True, True)
    assert (
        " % SLOWER"
        in CliRunner().invoke(rlm, ["operations"], obj=SimpleNamespace(app=client.app)).stdout
    )
    latest = client.snapshots("as_slow_as")[0].to_dict()
    assert (latest["executions"], latest["failures"], latest["version"]) == (MIN_ITEMS, 0, 1)
    assert latest["peak_memory_mb"] > 10
    json.dumps(latest)

    while len(watched.events()) < 2:
        watched.run(4.0)
    assert watched.events() == ["performance.degraded", "performance.recovered"]
