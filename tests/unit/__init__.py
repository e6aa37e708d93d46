"""Unit tests. The folders are those of the code; `stories` holds the tests that cross modules."""
