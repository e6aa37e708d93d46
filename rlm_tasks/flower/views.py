"""The handlers of Flower's web server for our tabs: pages, their data, and actions.

`install` adds them to Flower's routes.  Permissions follow Flower's rules.  A page needs the login
if there is one.  An action always needs a login, and no action works with ``--read-only``.  Calls
to Redis run in a thread.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flower import urls
from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado.ioloop import IOLoop
from tornado.template import Loader, Template
from tornado.web import HTTPError, authenticated

from resilience.errors import InvalidValue
from rlm_tasks.errors import JobNotFound, RlmError, StoreUnavailable
from rlm_tasks.flower import pages
from rlm_tasks.settings.environment import own_name

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client

TEMPLATES = Path(__file__).parent / "templates"
DRILL_S = 600.0


class _Chained(Loader):
    """A loader that finds our templates first, then Flower's."""

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        return name

    def _create_template(self, name: str) -> Any:
        own = TEMPLATES / name
        path = own if own.exists() else Path(urls.settings["template_path"]) / name
        return Template(path.read_bytes(), name=name, loader=self)


class _Ours(BaseHandler):  # type: ignore[misc]  # Flower ships no types
    """A handler that has a client of the platform."""

    @property
    def client(self) -> Client:
        """The client of Flower's app; one for all requests."""
        # The import needs the app, which is not complete while tabs are installed.
        from rlm_tasks.client.client import Client

        application = self.application
        if not hasattr(application, "rlm_client"):
            application.rlm_client = Client(self.capp)
        client: Client = application.rlm_client
        return client

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with the client in a thread; an error becomes a status and a sentence."""
        try:
            return await IOLoop.current().run_in_executor(None, function, self.client, *args)
        except StoreUnavailable as error:
            raise HTTPError(503, reason=_reason(error)) from None
        except JobNotFound as error:
            raise HTTPError(404, reason=_reason(error)) from None
        except (InvalidValue, RlmError) as error:
            raise HTTPError(400, reason=_reason(error)) from None

    @property
    def may_act(self) -> bool:
        """Whether this visitor may use the buttons."""
        options = self.application.options
        return (
            bool(options.basic_auth or options.auth or self.unauthenticated_api)
            and not options.read_only
        )


def _reason(error: Exception) -> str:
    return str(error).replace("\n", " ")[:300]


class PageView(_Ours):
    """A tab; with ``?json=1``, its data."""

    def initialize(self, name: str = "jobs") -> None:
        """Keep the name of the tab."""
        self._name = name

    def get_template_path(self) -> str:
        """Return our own folder: Tornado has one loader for each path."""
        return str(TEMPLATES)

    def create_template_loader(self, template_path: str) -> Loader:
        """Return a loader with which our template extends Flower's."""
        return _Chained(template_path)

    @authenticated
    async def get(self) -> None:
        """Send the page or its data."""
        await self.show(pages.TABS[self._name], pages.PAGES[self._name])

    async def show(self, title: str, page: Callable[..., pages.Picture], *about: Any) -> None:
        """Send a page, or its data."""
        if not self.get_argument("json", default=False, type=bool):
            self.render(
                "page.html", title=title, eyebrow=pages.TABS[self._name], tab=f"rlm-{self._name}"
            )
            return
        picture = await self.call(page, *about)
        self.set_header("Cache-Control", "no-store")
        self.write({**picture.to_dict(), "may_act": self.may_act, "hint": self._hint()})

    def _hint(self) -> str:
        """Return the reason why there are no buttons."""
        if self.application.options.read_only:
            return "This Flower is read-only."
        return (
            ""
            if self.may_act
            else "To cancel jobs, close breakers and begin drills, start Flower with --basic_auth "
            "or --auth."
        )

    def write_error(self, status_code: int, **about: Any) -> None:
        """Send the script a sentence, and people the error page of Flower."""
        if self.get_argument("json", default=False, type=bool) and status_code != 401:
            self.finish({"error": self._reason})
        else:
            super().write_error(status_code, **about)


class JobView(PageView):
    """One job."""

    @authenticated
    async def get(self, job_id: str) -> None:
        """Send the page or its data."""
        await self.show(f"Job {job_id}", pages.job, job_id)


class ActionView(_Ours, BaseApiHandler):  # type: ignore[misc]  # Flower ships no types
    """The action of a button."""

    @authenticated
    async def post(self, name: str) -> None:
        """Carry out the action, and send a sentence about it."""
        if self.application.options.read_only:
            raise HTTPError(403, reason="This Flower is read-only")
        if name not in ACTIONS:
            raise HTTPError(404, reason="There is no such action")
        about = {**self._about(), "by": self._visitor()}
        self.write({"done": await self.call(ACTIONS[name], about)})

    def _visitor(self) -> str:
        """Return the name of a visitor who may act, as far as Flower's login knows it."""
        user = self.current_user  # True without OAuth
        if self.application.options.basic_auth:
            credentials = self.request.headers["Authorization"].split()[1]
            user = b64decode(credentials).decode().partition(":")[0]
        name = f"Flower of {own_name()}"
        return f"{user} in {name}" if isinstance(user, str) and user else name

    def _about(self) -> dict[str, str]:
        return {
            name: self.get_body_argument(name)
            for name in self.request.body_arguments
            if name != "_xsrf"
        }

    def write_error(self, status_code: int, **about: Any) -> None:
        """Send the script a sentence."""
        if status_code == 401 and self.application.options.basic_auth:
            # Without a challenge, a browser sends a password only below the path of the login.
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        error = (about.get("exc_info") or (None, None))[1]
        message = (
            error.get_message()
            if isinstance(error, HTTPError) and hasattr(error, "get_message")
            else ""
        )
        self.finish({"error": getattr(error, "reason", None) or message or self._reason})


def _cancel(client: Client, about: dict[str, str]) -> str:
    client.job(about.get("job", "")).cancel(by=about["by"])
    return "It is cancelled"


def _retry(client: Client, about: dict[str, str]) -> str:
    return f"Job {client.job(about.get('job', '')).retry_failed().id} runs the failed items again"


def _reset(client: Client, about: dict[str, str]) -> str:
    if (name := about.get("breaker", "")) not in client.breakers.names():
        raise InvalidValue("breaker", name, "there is no such breaker")
    client.breakers.reset(name)
    return f"Breaker {name} is closed"


def _force(client: Client, about: dict[str, str]) -> str:
    client.pressure.force(about.get("level", ""), DRILL_S)
    return f"All workers act on {about['level']}"


def _release(client: Client, _about: dict[str, str]) -> str:
    return "The drill has ended" if client.pressure.release() else "There was no drill"


ACTIONS: dict[str, Callable[[Client, dict[str, str]], str]] = {
    "cancel": _cancel,
    "retry": _retry,
    "reset": _reset,
    "force": _force,
    "release": _release,
}
