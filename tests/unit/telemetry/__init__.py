"""Unit tests of `rlm_tasks.telemetry`: one file for each module."""
