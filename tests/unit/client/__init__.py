"""Unit tests of `rlm_tasks.client`: one file for each module."""
