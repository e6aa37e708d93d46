"""Unit tests of `rlm_tasks.testing`: one file for each module."""
