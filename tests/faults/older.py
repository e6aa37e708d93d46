"""The platform's app with the schema number of the previous version, for the upgrade tests."""

from __future__ import annotations

from rlm_tasks.jobs import spec

spec.SCHEMA -= 1

from rlm_tasks.celery import app as app  # noqa: E402  # the import needs the number above
