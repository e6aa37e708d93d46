"""The settings of guards."""

from __future__ import annotations

from resilience.settings import StoreSettings

WATCHED = "sentinel://me:s3%40cret@one:26380/2;sentinel://two"


def test_the_address_is_that_of_the_settings() -> None:
    own = StoreSettings(redis_url=WATCHED, sentinel_master="primary")

    assert own.address.is_watched
    assert not StoreSettings(redis_url="redis://host").address.is_watched
