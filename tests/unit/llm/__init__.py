"""Unit tests of `rlm_tasks.llm`: one file for each module."""
