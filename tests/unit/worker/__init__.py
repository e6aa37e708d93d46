"""Unit tests of `rlm_tasks.worker`: one file for each module."""
