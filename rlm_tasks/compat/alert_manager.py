"""`ResourceAlertManager`: the platform's alerts with the channels and names of other orchestrators.

Users who migrate make one with `channels` and `webhook_url`; `AdaptiveResourceManager` takes it as
its `alerts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from resilience.errors import InvalidValue
from scheduler.alerts import Alert, AlertChannel, Alerts

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client


class ResourceAlertManager(Alerts):
    """The alerts of the platform, sent to channels of one's own; the history is shared."""

    def __init__(
        self,
        channels: Sequence[AlertChannel | str] = (AlertChannel.LOG,),
        webhook_url: str = "",
        signal_callback: Callable[[Alert], object] | None = None,
        *,
        client: Client | None = None,
    ) -> None:
        """The channel SIGNAL calls `signal_callback`.  Without a `client`, the environment names
        the platform.

        Raises InvalidValue for a channel that does not exist, for WEBHOOK without a usable URL,
        and for SIGNAL without a callback, or a callback without SIGNAL.
        """
        wanted = [_channel(each) for each in channels]
        if (AlertChannel.SIGNAL in wanted) is not (signal_callback is not None):
            raise InvalidValue(
                "signal_callback",
                signal_callback,
                "is called by the channel SIGNAL; give both, or none of them",
            )
        if client is None:
            from rlm_tasks.client.client import default_client

            client = default_client()
        settings = client.settings.alerts.model_copy(
            update={
                "channels": tuple(str(each) for each in wanted if each is not AlertChannel.SIGNAL),
                "webhook_url": webhook_url or client.settings.alerts.webhook_url,
            }
        )
        super().__init__(client.session.store, settings, client.session.events, signal_callback)


def _channel(name: AlertChannel | str) -> AlertChannel:
    try:
        return AlertChannel(name)
    except ValueError:
        known = ", ".join(AlertChannel)
        raise InvalidValue("channels", name, f"must be one of {known}") from None
