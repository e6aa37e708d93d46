"""The platform's app as a worker of the previous schema runs it."""

from __future__ import annotations

from rlm_tasks.jobs import spec

spec.SCHEMA -= 1

from rlm_tasks.celery import app as app  # noqa: E402  # the number above is what makes it older
