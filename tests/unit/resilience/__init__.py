"""Unit tests of `resilience`: one file for each module."""
