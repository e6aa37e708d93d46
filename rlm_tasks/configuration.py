"""The old path of `rlm_tasks.settings.document`; it works for one more version."""

from rlm_tasks.moved import forward

__getattr__ = forward("rlm_tasks.configuration")
