"""How a call survives: primitives that every worker shares through Redis.

Knows Redis; refuses to know Celery, hosts, or who is asking.
"""
