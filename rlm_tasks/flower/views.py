"""What the browser is answered: pages, their data, and actions.

Decides who may look and act, by Flower's own rules: a page needs its login where there is one, an
action needs a login always, and none with ``--read-only``.  Redis is asked in a thread; refuses to
know what a page shows."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client

TEMPLATES = Path(__file__).parent / "templates"
DRILL_S = 600.0


class _Chained(Loader):
    """Our template, and Flower's beneath it."""

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        return name

    def _create_template(self, name: str) -> Any:
        own = TEMPLATES / name
        path = own if own.exists() else Path(urls.settings["template_path"]) / name
        return Template(path.read_bytes(), name=name, loader=self)


class _Ours(BaseHandler):  # type: ignore[misc]  # Flower ships no types
    """A handler that asks the platform."""

    @property
    def client(self) -> Client:
        """The client of the app that Flower was started for; one for all requests."""
        from rlm_tasks.client.client import (
            Client,
        )  # it needs the app, which is being made while tabs are installed

        application = self.application
        if not hasattr(application, "rlm_client"):
            application.rlm_client = Client(self.capp)
        found: Client = application.rlm_client
        return found

    async def ask(self, question: Callable[..., Any], *about: Any) -> Any:
        """Ask in a thread; what goes wrong is told in a sentence."""
        try:
            return await IOLoop.current().run_in_executor(None, question, self.client, *about)
        except StoreUnavailable as error:
            raise HTTPError(503, reason=_reason(error)) from None
        except JobNotFound as error:
            raise HTTPError(404, reason=_reason(error)) from None
        except (InvalidValue, RlmError) as error:
            raise HTTPError(400, reason=_reason(error)) from None

    @property
    def may_act(self) -> bool:
        """Whether this visitor may do more than look."""
        options = self.application.options
        return (
            bool(options.basic_auth or options.auth or self.unauthenticated_api)
            and not options.read_only
        )


def _reason(error: Exception) -> str:
    return str(error).replace("\n", " ")[:300]


class PageView(_Ours):
    """A tab, or with ``?json=1`` what is on it."""

    def initialize(self, name: str = "jobs") -> None:
        """Take the tab's name."""
        self._name = name

    def get_template_path(self) -> str:
        """Keep our templates apart: Tornado has one loader for each path."""
        return str(TEMPLATES)

    def create_template_loader(self, template_path: str) -> Loader:
        """Let our template extend Flower's."""
        return _Chained(template_path)

    @authenticated
    async def get(self) -> None:
        """Answer the page or its data."""
        await self.show(pages.TABS[self._name], pages.PAGES[self._name])

    async def show(self, title: str, page: Callable[..., pages.Picture], *about: Any) -> None:
        """Draw a page, or tell what is on it."""
        if not self.get_argument("json", default=False, type=bool):
            self.render(
                "page.html", title=title, eyebrow=pages.TABS[self._name], tab=f"rlm-{self._name}"
            )
            return
        picture = await self.ask(page, *about)
        self.set_header("Cache-Control", "no-store")
        self.write({**picture.to_dict(), "may_act": self.may_act, "hint": self._hint()})

    def _hint(self) -> str:
        """Say why there are no buttons."""
        if self.application.options.read_only:
            return "This Flower is read-only."
        return (
            ""
            if self.may_act
            else "To cancel jobs, close breakers and drill, start Flower with --basic_auth or --auth."
        )

    def write_error(self, status_code: int, **about: Any) -> None:
        """Tell the script in words, a person as Flower does."""
        if self.get_argument("json", default=False, type=bool) and status_code != 401:
            self.finish({"error": self._reason})
        else:
            super().write_error(status_code, **about)


class JobView(PageView):
    """One job."""

    @authenticated
    async def get(self, job_id: str) -> None:
        """Answer the page or its data."""
        await self.show(f"Job {job_id}", pages.job, job_id)


class ActionView(_Ours, BaseApiHandler):  # type: ignore[misc]  # Flower ships no types
    """What a button does."""

    @authenticated
    async def post(self, name: str) -> None:
        """Do it, and say what was done."""
        if self.application.options.read_only:
            raise HTTPError(403, reason="This Flower is read-only")
        if name not in ACTIONS:
            raise HTTPError(404, reason="There is no such action")
        self.write({"done": await self.ask(ACTIONS[name], self._about())})

    def _about(self) -> dict[str, str]:
        return {
            name: self.get_body_argument(name)
            for name in self.request.body_arguments
            if name != "_xsrf"
        }

    def write_error(self, status_code: int, **about: Any) -> None:
        """Tell the script in words."""
        if status_code == 401 and self.application.options.basic_auth:
            # A browser sends a password unasked only below the path for which it was given.
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        error = (about.get("exc_info") or (None, None))[1]
        told = (
            error.get_message()
            if isinstance(error, HTTPError) and hasattr(error, "get_message")
            else ""
        )
        self.finish({"error": getattr(error, "reason", None) or told or self._reason})


def _cancel(client: Client, about: dict[str, str]) -> str:
    client.job(about.get("job", "")).cancel()
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
