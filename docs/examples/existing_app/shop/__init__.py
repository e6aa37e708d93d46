"""A shop with a Celery app of its own, into which the platform is installed."""
