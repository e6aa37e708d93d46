"""What all tests share: an environment without RLM_* variables, and examples without a bound on
wall time.
"""

from __future__ import annotations

import os

from hypothesis import settings

for _name in [name for name in os.environ if name.startswith(("RLM_", "CELERY_"))]:
    # A developer's own settings must not decide what a test sees.
    del os.environ[_name]

settings.register_profile("rlm", deadline=None)
settings.load_profile("rlm")
