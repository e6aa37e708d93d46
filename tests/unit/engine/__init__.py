"""Unit tests of `rlm_tasks.engine`: one file for each module."""
