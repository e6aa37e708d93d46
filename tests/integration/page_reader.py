"""The reader of a page: it runs commands and code of the page in an empty folder.

It waits until started processes are ready, and uses a real server.  `tests.integration.pages`
defines the treatment of each block.  The page tests call it; begin with `Reader.carry_out`."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from rlm_tasks.testing import embedded
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.integration.pages import (
    PAGES,
    ROOT,
    SAID,
    Block,
    Step,
    Wrong,
    alike,
    missing,
    parse,
    steps,
)

BLOCK_S = 60.0
"""The longest time of a block, in seconds."""
PORTS = (5555, 5556, *range(8000, 8004), 8089)
"""Ports that pages name: those of Flower, and of workers."""


class Interpreter:
    """The process of a page's python blocks."""

    def __init__(self, folder: Path, environment: Mapping[str, str], output: Path) -> None:
        """Its prints go to the file `output`, its errors to a file beside it."""
        self.output, self.errors = output, output.with_suffix(".err")
        source = Path(__file__).with_name("page_interpreter.py").read_text(encoding="utf-8")
        inside, outside = os.pipe()
        with output.open("wb") as out, self.errors.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", source, str(outside)],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                pass_fds=[outside],
                start_new_session=True,
            )
        os.close(outside)
        self._answers = open(inside, encoding="utf-8")  # noqa: PTH123, SIM115  # a number, not a path; closed by `close`

    def run(
        self, block: Block, text: str, folder: Path, environment: Mapping[str, str]
    ) -> list[tuple[int, str]]:
        """Run a block; return its prints as (line, text).

        Raises Wrong if the block fails, or runs longer than BLOCK_S."""
        asked = {
            "name": block.page,
            "line": block.line,
            "text": text,
            "folder": str(folder),
            "environment": dict(environment),
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        if not select.select([self._answers], [], [], BLOCK_S)[0]:
            self._process.kill()
            raise Wrong(f"{block}: still runs after {BLOCK_S:.0f} s")
        if not (line := self._answers.readline()):
            raise Wrong(f"{block}: the interpreter has ended:\n{_end_of(self.errors)}")
        answer = json.loads(line)
        if answer["error"]:
            raise Wrong(f"{block}:\n{answer['error']}{_end_of(self.errors)}")
        return [(line, text) for line, text in answer["printed"]]

    def close(self) -> None:
        """End it as a prompt ends: by the end of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        embedded.end(self._process)
        self._answers.close()


@dataclass
class Running:
    """A worker, beat, Flower or provider that a line of a page has started."""

    place: str
    kind: str
    process: subprocess.Popen[bytes]
    log: Path
    ready: Callable[[], bool]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds.

        Raises Wrong when the process has ended, or after START_S."""
        until = time.monotonic() + embedded.START_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                raise Wrong(f"{self.place}: the {self.kind} did not start:\n{_end_of(self.log)}")
            time.sleep(0.01)


class Reader:
    """Runs the blocks of a page, with a folder, an environment and the processes started so far.

    Exports and ``cd`` of the page change environment and folder."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        apart: Path,
        stopping: ExitStack,
        instead: Mapping[str, str],
    ) -> None:
        """`apart` is a folder for logs and state; `instead` maps a page's addresses to those here.

        `stopping` waits for the end of the started processes, while the next page is read."""
        self.folder, self.environment, self._apart = folder, environment, apart
        self._stopping, self._instead = stopping, instead
        self.printed: str | None = None  # by the last block that was run
        self._comments: dict[int, str] = {}  # line -> its expected print
        self._lines_printed: set[int] = set()
        self._interpreter: Interpreter | None = None
        self._running: list[Running] = []
        self._unsettled: list[Running] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._running:
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGTERM)
        if self._interpreter is not None:
            self._interpreter.close()

    def carry_out(self, blocks: list[Block]) -> None:
        """Run the blocks of a page.  Raises Wrong at the first that does not do what it says."""
        for block in blocks:
            parse(block)
            if block.title == "prints":
                self._compare(block)
            elif block.title:
                self._write(block)
            elif block.language == "python":
                self._python(block)
            elif block.language == "sh":
                self._sh(block)
        self._settle()
        if silent := self._comments.keys() - self._lines_printed:
            raise Wrong(f"{blocks[0].page}:{min(silent)}: this line has not printed anything")

    def _here(self, text: str) -> str:
        for there, here in self._instead.items():
            text = text.replace(there, here)
        return text

    def _write(self, block: Block) -> None:
        path = self.folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._here(block.text), encoding="utf-8")

    def _compare(self, block: Block) -> None:
        if self.printed is None:
            raise Wrong(f"{block}: nothing before it has been run")
        if not alike(self._here(block.text), self.printed):
            raise Wrong(
                f"{block}: the page says\n{block.text}but what is printed is\n{self.printed}"
            )

    # --- python ---

    def _python(self, block: Block) -> None:
        self._settle()
        if self._interpreter is None:
            self._interpreter = Interpreter(
                self.folder, self.environment, self._apart / "python.out"
            )
        text = self._here(block.text)
        for number, line in enumerate(text.splitlines(), start=block.line):
            if (comment := SAID.match(line)) is not None:
                self._comments[number] = comment[1]
        before = self._interpreter.output.stat().st_size
        for number, printed in self._interpreter.run(block, text, self.folder, self.environment):
            self._lines_printed.add(number)
            if number in self._comments and not alike(self._comments[number], printed):
                raise Wrong(
                    f"{block.page}:{number}: the comment says {self._comments[number]!r},"
                    f" but what is printed is {printed!r}"
                )
        self.printed = self._interpreter.output.read_bytes()[before:].decode()

    # --- sh ---

    def _sh(self, block: Block) -> None:
        self.printed = None
        for step in steps(block):
            place = f"{block.page}:{step.line}"
            if step.starts:
                self._start(place, step)
            elif not step.elsewhere:
                self._settle()
                self.printed = (self.printed or "") + self._bash(place, step)
            elif names := missing(step.text, self.folder):
                raise Wrong(f"{place}: there is no {', '.join(names)}")

    def _bash(self, place: str, step: Step) -> str:
        """Run commands, keep their exports and their last folder, and return their output.

        Raises Wrong if a command fails, or the commands run longer than BLOCK_S."""
        state, output, errors = (self._apart / f"sh.{name}" for name in ("state", "out", "err"))
        traps = (
            """trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR; """
            f"trap 'env -0 > {shlex.quote(str(state))}' EXIT"
        )
        # With empty lines for the page's lines before the commands, bash names lines of the page.
        script = traps + ";" + "\n" * (step.line - 1) + self._here(step.text)
        with output.open("wb") as out, errors.open("wb") as err:
            process = self._popen(script, out, err)
        try:
            code = process.wait(BLOCK_S)
        except subprocess.TimeoutExpired:
            raise Wrong(
                f"{place}: still runs after {BLOCK_S:.0f} s:\n{_end_of(output)}{_end_of(errors)}"
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            raise Wrong(f"{place}: exit code {code}:\n{_end_of(output)}{_end_of(errors)}")
        variables = state.read_bytes().decode().rstrip("\0").split("\0")
        self.environment = {
            name: value for name, _, value in (each.partition("=") for each in variables)
        }
        self.folder = Path(self.environment["PWD"])
        return output.read_text(encoding="utf-8")

    def _start(self, place: str, step: Step) -> None:
        """Start a process that runs until the page ends; the next command waits for it."""
        name = f"{len(self._running)}-{step.starts}"
        log, ready = self._apart / f"{name}.log", self._apart / f"{name}.ready"
        command = self._here(step.text).strip().removesuffix("&")
        with log.open("wb") as output:
            # `env` sets the variables that stand before a command.  With `exec` no bash is left, so
            # signals reach the process.
            process = self._popen(f"exec env {command}", output, output, RLM_READY_FILE=str(ready))
        self._stopping.callback(embedded.end, process)
        option = re.search(r"--port[= ](\d+)", command)
        port = int(option[1] if option else self.environment["FLOWER_PORT"])
        is_ready: dict[str, Callable[[], bool]] = {
            "worker": ready.exists,
            "flower": lambda: _answers(port),
            "provider": lambda: _answers(port),
            "beat": lambda: b"starting" in log.read_bytes(),
        }
        running = Running(place, step.starts, process, log, is_ready[step.starts])
        self._running.append(running)
        self._unsettled.append(running)

    def _popen(
        self, script: str, out: IO[bytes], err: IO[bytes], **more: str
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-e", "-c", script],
            cwd=self.folder,
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )

    def _settle(self) -> None:
        """Wait until all started processes are ready, and the monitor has run once if beat runs."""
        if not self._unsettled:
            return
        for each in self._unsettled:
            each.wait(each.ready)
        self._unsettled.clear()
        alive = {each.kind: each for each in self._running if each.process.poll() is None}
        if "beat" in alive and "worker" in alive:
            with client_of({**self.environment, "RLM_OPERATIONS": ""}) as client:
                alive["beat"].wait(lambda: client.pressure.history(1) != [])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


# --- readers ----------------------------------------------------------------------------------


def reader_of(
    name: str, url: str, folder: Path, stopping: ExitStack, **more: str
) -> tuple[Reader, dict[int, int]]:
    """Return the reader of a page in an empty folder, and the ports: page's port -> port here.

    `more` are further environment variables."""
    ports = {there: embedded.free_port() for there in PORTS}
    for each in ("reader", "apart"):
        (folder / each).mkdir()
    own = _environment(url, name, ports) | more
    return Reader(folder / "reader", own, folder / "apart", stopping, _instead(url, ports)), ports


def _environment(url: str, name: str, ports: dict[int, int]) -> dict[str, str]:
    """Return the environment before the page begins: only addresses and ports of this machine."""
    # A drill needs pressure.  For all other pages, load on this machine must not matter.
    pressed = bool(re.search(r"pressure[ .]force", PAGES[name]))
    found = environment_of(
        url,
        "page-" + re.sub(r"\W+", "-", name),
        pressed=pressed,
        RLM_PRESSURE__MONITOR_S="1",
        RLM_SLOTS=str(SLOTS),
        CELERY_WORKER_METRICS_PORT=str(ports[8000]),
        FLOWER_PORT=str(ports[5555]),
        PATH=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        PYTHONUNBUFFERED="1",
        COLUMNS="160",
    )
    del found["RLM_OPERATIONS"], found["PYTHONPATH"]
    # Only a page for developers, whose examples are tests, finds the folder `tests`.
    found["PYTHONPATH"] = str(ROOT) if "from tests." in PAGES[name] else ""
    return os.environ | found


def _instead(url: str, ports: dict[int, int]) -> dict[str, str]:
    """Return a map from addresses that pages name to the addresses here."""
    ways = ("localhost:{}", "127.0.0.1:{}", "port={}", "port {}")
    own = {way.format(there): way.format(here) for there, here in ports.items() for way in ways}
    return own | {"redis://localhost:6379": url.removesuffix("/0")}
