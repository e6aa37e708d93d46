"""The names of Redis keys."""

from __future__ import annotations

from resilience.keys import Keys


def test_keys_of_a_job_share_its_hash_tag_and_namespace() -> None:
    keys = Keys("acme").of("j1")

    assert all(key.startswith("acme:{j1}:") for key in keys)
    assert len(set(keys)) == len(keys)
