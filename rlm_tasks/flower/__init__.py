"""Tabs of the platform in Flower: Jobs, Pressure, Breakers, Limits, Queues.

`installation` calls `install` when Flower starts.  Flower has no interface for tabs, so `install`
changes its handlers and templates; style, login and URL prefix stay Flower's.  Begin with `pages`,
which makes the content; `views` answers the browser.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery
from flower import urls
from flower.options import default_options
from prometheus_client import REGISTRY
from tornado.web import StaticFileHandler, TemplateModule, url

from rlm_tasks.flower.gauges import Gauges
from rlm_tasks.flower.pages import TABS
from rlm_tasks.flower.views import ActionView, JobView, PageView

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client

HERE = Path(__file__).parent
LOOPBACK = "127.0.0.1"


class TabbedBar(TemplateModule):
    """Flower's own templates, with our tabs in its navigation bar."""

    def render(self, path: str, **values: Any) -> bytes:
        """Return a rendered template; in the bar, our tabs follow Flower's in its first list.

        If a version of Flower has no such list, our tabs are missing.
        """
        html: bytes = super().render(path, **values)
        head, end, tail = html.partition(b"</ul>")
        return (
            head + self._tabs(values.get("active_tab")) + end + tail
            if path == "navbar.html" and end
            else html
        )

    def _tabs(self, active: object) -> bytes:
        return "".join(
            self._tab(f"rlm-{name}", title, f"rlm-{name}" == active) for name, title in TABS.items()
        ).encode()

    def _tab(self, name: str, title: str, is_active: bool) -> str:
        active = 'active" aria-current="page"' if is_active else '"'
        href = self.handler.reverse_url(name)
        return f'<li class="nav-item"><a class="nav-link {active} href="{href}">{title}</a></li>'


def install(app: Celery) -> None:
    """Add tabs and metrics to the Flower that starts in this process.

    Call it before Flower is made.  A second call changes nothing.
    """
    if any(getattr(each, "name", None) == "rlm-job" for each in urls.handlers):
        return
    urls.handlers[0:0] = [
        url(r"/rlm/job/([^/]+)", JobView, name="rlm-job"),
        url(r"/rlm/do/([a-z-]+)", ActionView, name="rlm-do"),
        url(
            r"/rlm/static/(.*)",
            StaticFileHandler,
            {"path": str(HERE / "static")},
            name="rlm-static",
        ),
        *(url(rf"/rlm/{name}", PageView, {"name": name}, name=f"rlm-{name}") for name in TABS),
    ]
    urls.settings.setdefault("ui_modules", {})["Template"] = TabbedBar
    default_options.add_parse_callback(_stay_on_loopback)
    REGISTRY.register(Gauges(lambda: _client(app)))


def _client(app: Celery) -> Client:
    # The client needs the app, which is not complete yet when this module is loaded.
    from rlm_tasks.client.client import Client

    return Client(app)


def _stay_on_loopback() -> None:
    """Listen on the loopback address, unless an address is configured or users must log in."""
    options = default_options
    if not (options.address or options.unix_socket or options.basic_auth or options.auth):
        options.address = LOOPBACK
