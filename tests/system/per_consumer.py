"""The platform's app on a RabbitMQ that counts what is prefetched by consumer, as RabbitMQ 4 does
and RabbitMQ 3 can.
"""

from __future__ import annotations

from kombu.transport.pyamqp import Transport

from rlm_tasks.celery import app as app

Transport.qos_semantics_matches_spec = lambda *_: True  # type: ignore[method-assign]  # what kombu says of RabbitMQ 4
