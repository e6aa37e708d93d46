"""The platform's app with prefetch limits per consumer, as in RabbitMQ 4.

RabbitMQ 3 supports them, too.  The RabbitMQ tests start a worker with it."""

from __future__ import annotations

from kombu.transport.pyamqp import Transport

from rlm_tasks.celery import app as app

Transport.qos_semantics_matches_spec = lambda *_: True  # type: ignore[method-assign]  # as kombu does for RabbitMQ 4
