"""Unit tests of `scheduler`: one file for each module."""
