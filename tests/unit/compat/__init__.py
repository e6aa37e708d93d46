"""Unit tests of `rlm_tasks.compat`: one file for each module."""
