"""Settings of all tests: no RLM_* or CELERY_* variables, and no time limit for Hypothesis examples.

pytest loads this file first."""

from __future__ import annotations

import os

from hypothesis import settings

for _name in [name for name in os.environ if name.startswith(("RLM_", "CELERY_"))]:
    # A developer's own settings must not change the result of a test.
    del os.environ[_name]

settings.register_profile("rlm", deadline=None)
settings.load_profile("rlm")
