"""A worker's main process: it renews leases, releases lost nodes, offers free slots and sweeps.

`installation` adds its boot steps to Celery.  Begin with `supervisor`, then `bootsteps`.
"""
