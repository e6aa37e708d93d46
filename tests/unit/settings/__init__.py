"""Unit tests of `rlm_tasks.settings`: one file for each module."""
