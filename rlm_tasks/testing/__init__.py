"""For tests and for trying things: an embedded server, a fake provider, the demo, and plain Celery
to compare with.

Tests, the demo and the benchmarks call it; the platform itself does not.  Begin with `embedded`.
"""
