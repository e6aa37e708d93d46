"""The shop's Celery app."""

from celery import Celery

from rlm_tasks import install

app = Celery("shop", include=["shop.tasks"])
app.config_from_object("shop.celeryconfig")
install(app)
