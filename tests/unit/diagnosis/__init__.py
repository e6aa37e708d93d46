"""Unit tests of `rlm_tasks.diagnosis`: one file for each module."""
