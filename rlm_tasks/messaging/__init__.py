"""How a node becomes a Celery message: dispatch, delivery to parked nodes, brokers, queue names and
depths.

Clients send first nodes, the engine and the worker all others.  Begin with `dispatch`.
"""
