"""The shop's Celery configuration from before the platform was installed."""

import os

broker_url = os.environ.get("SHOP_BROKER_URL", "redis://localhost:6379/1")
broker_transport_options = {"global_keyprefix": "shop:"}
task_routes = {"shop.tasks.send_*": {"queue": "mail"}}
beat_schedule = {"count-stock": {"task": "shop.tasks.count_stock", "schedule": 600.0}}
task_ignore_result = True
