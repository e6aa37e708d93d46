"""Unit tests of `rlm_tasks.jobs`: one file for each module."""
