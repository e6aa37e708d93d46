"""Unit tests in the folders of the code; `stories` holds the tests that cross modules."""
