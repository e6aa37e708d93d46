"""What a worker tells of itself: logs, traces, its metrics port and its health.

The worker starts it; `client` and `diagnosis` reuse its judgements.  Begin with `worker_port`.
"""
