"""Unit tests of `rlm_tasks.operations`: one file for each module."""
