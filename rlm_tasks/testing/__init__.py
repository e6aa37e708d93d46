"""Tools for tests and trials: an embedded Redis, a fake provider, the demo, plain Celery tasks.

Tests, the demo and the benchmarks call it; the platform itself does not.  Begin with `embedded`.
"""
