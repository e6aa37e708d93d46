"""Logs, traces, metrics and health of a worker.

`installation` and the worker's boot steps start it; clients use its health rules.  Begin with
`worker_port`.
"""
