"""A shop with its own Celery app, to which `install` adds the platform."""
