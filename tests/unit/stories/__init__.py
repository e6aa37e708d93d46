"""Unit tests that cross modules: whole jobs and models, in one process."""
