"""Unit tests of `rlm_tasks.ledger`: one file for each module."""
