"""Unit tests of `rlm_tasks.messaging`: one file for each module."""
