"""When, where and how much: decides, never executes.

Knows slots and rules; refuses to know Celery and what a job computes.
"""
