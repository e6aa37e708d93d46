"""A real Flower for the length of a block, and HTTP requests to it without a browser.

Integration, fault and browser tests use it; begin with `flower`."""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlm_tasks.testing import embedded
from tests.support import wait_until

ROOT = Path(__file__).parents[2]
USER = "me:secret-of-me"
BEAT = ("-B", "--scheduler", "celery.beat:Scheduler")
"""Options of a worker with an embedded beat, for tests that need the monitor."""


@dataclass(frozen=True)
class Flower:
    """A running Flower."""

    url: str
    pid: int

    def get(self, path: str, user: str = "") -> tuple[int, str]:
        """Return the status and the text of a page."""
        return self._ask(urllib.request.Request(self.url + path), user)  # noqa: S310  # of this machine

    def data(self, path: str, user: str = "") -> dict[str, Any]:
        """Return the data of a page."""
        status, text = self.get(f"{path}?json=1", user)
        assert status == 200, text
        return json.loads(text)  # type: ignore[no-any-return]  # JSON has no types

    def post(
        self, action: str, user: str = "", *, site: str = "same-origin", **about: str
    ) -> tuple[int, dict[str, str]]:
        """Send the request of a button; return the status and the answer."""
        body = urllib.parse.urlencode(about).encode()
        headers = {"Sec-Fetch-Site": site}
        request = urllib.request.Request(f"{self.url}/rlm/do/{action}", body, headers)  # noqa: S310  # of this machine
        status, text = self._ask(request, user)
        return status, json.loads(text)

    def _ask(self, request: urllib.request.Request, user: str) -> tuple[int, str]:
        if user:
            request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # of this machine
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def flower(
    environment: Mapping[str, str], log: Path, *options: str, prefix: str = ""
) -> Iterator[Flower]:
    """Run a Flower for the length of a block; it answers when the block begins.

    `prefix` is the first part of all paths, such as ``/ops``."""
    port = embedded.free_port()
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "rlm_tasks",
        "flower",
        f"--port={port}",
        *options,
    ]
    if prefix:
        command.append(f"--url_prefix={prefix.strip('/')}")
    with log.open("wb") as output:
        process = embedded.start_worker(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    own = Flower(f"http://127.0.0.1:{port}{prefix}", process.pid)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return own.get("/healthcheck")[0] == 200
        except OSError:
            return False

    try:
        wait_until(answers)
        yield own
    finally:
        embedded.end(process)
