"""What all tests share: an environment without RLM_* variables, and waiting on conditions."""

from __future__ import annotations

import os

for _name in [name for name in os.environ if name.startswith(("RLM_", "CELERY_"))]:
    # A developer's own settings must not decide what a test sees.
    del os.environ[_name]
