"""The platform's app with pools that grow and shrink fast enough for a test."""

from __future__ import annotations

import scheduler.autoscale
from rlm_tasks.celery import app as app

scheduler.autoscale.GROW_EVERY_S = 0.5
scheduler.autoscale.SHRINK_EVERY_S = 0.2
scheduler.autoscale.IDLE_S = 2.0
