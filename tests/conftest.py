"""Settings of all tests: no RLM_* or CELERY_* variables, no width of a terminal, no time limit for
Hypothesis examples.

Workers start without the import of Celery.  pytest loads this file first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from rlm_tasks.testing import embedded
from tests.warm import Starter

for _name in [name for name in os.environ if name.startswith(("RLM_", "CELERY_"))]:
    # A developer's own settings must not change the result of a test.
    del os.environ[_name]
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it: a command would wrap what a test reads

settings.register_profile("rlm", deadline=None)
settings.load_profile("rlm")


@pytest.fixture(scope="session", autouse=True)
def warm_start() -> Iterator[None]:
    """Start each worker as a fork of a process that has imported Celery."""
    starter = Starter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "start_worker", starter)
        yield
    starter.close()
