"""Unit tests of `rlm_tasks.metrics`: one file for each module."""
