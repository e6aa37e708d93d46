"""How a node becomes a Celery message, and how queues are named, measured and configured.

Clients send the first node of each job, the engine and the worker send all others.  Begin with
`dispatch`, then `delivery`.
"""
