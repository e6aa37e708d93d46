"""Who reads a page of the documentation and does all that it says, in an empty folder, with a real
server.

Decides how commands and code are run, and when what was started is ready.  Refuses to know what a
block is for: `tests.integration.pages` says so."""

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
from tests.integration.pages import PAGES, SAID, Block, Step, Wrong, alike, missing, parse, steps

BLOCK_S = 60.0
"""How long a block may take."""
PORTS = (5555, 5556, *range(8000, 8004), 8089)
"""Ports that pages name: of Flowers, and of workers."""


class Interpreter:
    """The process of a page's python blocks."""

    def __init__(self, folder: Path, environment: Mapping[str, str], output: Path) -> None:
        """`output` is the file that gets what it prints; its errors go beside it."""
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
        """Run a block; return what its prints have written, by line."""
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
        """Let it end as a prompt does, by the end of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        embedded.end(self._process)
        self._answers.close()


@dataclass
class Running:
    """A worker, beat, Flower or provider that a page has started, by a line of it."""

    place: str
    kind: str
    process: subprocess.Popen[bytes]
    log: Path
    ready: Callable[[], bool]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds.  Raises Wrong when it never will."""
        until = time.monotonic() + embedded.START_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                raise Wrong(f"{self.place}: the {self.kind} did not start:\n{_end_of(self.log)}")
            time.sleep(0.01)


class Reader:
    """Who carries a page out: in a folder, with an environment that exports change, and with what
    was started so far.
    """

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        apart: Path,
        stopping: ExitStack,
        instead: Mapping[str, str],
    ) -> None:
        """`apart` is where what the reader does not see is kept, and `instead` how what a page
        calls localhost is called here.

        `stopping` waits for the end of what is started, which takes its time; the next page may be
        read meanwhile."""
        self.folder, self.environment, self._apart = folder, environment, apart
        self._stopping, self._instead = stopping, instead
        self.printed: str | None = None  # by the last block that was run
        self._comments: dict[int, str] = {}  # line -> what it has to print
        self._heard: set[int] = set()
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
        """Do what the blocks of a page say.  Raises Wrong at the first that does not do what it
        says.
        """
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
        if silent := self._comments.keys() - self._heard:
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
            self._heard.add(number)
            if number in self._comments and not alike(said := self._comments[number], printed):
                raise Wrong(
                    f"{block.page}:{number}: the comment says {said!r}, but what is printed is {printed!r}"
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
        """Run commands, keep what they export and where they go, and return what they print."""
        state, output, errors = (self._apart / f"sh.{name}" for name in ("state", "out", "err"))
        traps = f"""trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR; trap 'env -0 > {shlex.quote(str(state))}' EXIT"""
        # As many empty lines as stand before the commands make bash name the page's own lines.
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
        """Start what goes on until the page ends; it is waited for when something is run next."""
        name = f"{len(self._running)}-{step.starts}"
        log, ready = self._apart / f"{name}.log", self._apart / f"{name}.ready"
        command = self._here(step.text).strip().removesuffix("&")
        with log.open("wb") as output:
            # `env` takes the variables that stand before a command; bash itself is gone, so that
            # signals arrive.
            process = self._popen(f"exec env {command}", output, output, RLM_READY_FILE=str(ready))
        self._stopping.callback(embedded.end, process)
        port = int(
            told[1]
            if (told := re.search(r"--port[= ](\d+)", command))
            else self.environment["FLOWER_PORT"]
        )
        how: dict[str, Callable[[], bool]] = {
            "worker": ready.exists,
            "flower": lambda: _answers(port),
            "provider": lambda: _answers(port),
            "beat": lambda: b"starting" in log.read_bytes(),
        }
        running = Running(place, step.starts, process, log, how[step.starts])
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
        """Wait until all that was started is ready, and a beat's first look at the platform has
        been taken.
        """
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


# --- where pages are read ---------------------------------------------------------------------


def reader_of(
    name: str, url: str, folder: Path, stopping: ExitStack, **more: str
) -> tuple[Reader, dict[int, int]]:
    """Return who reads a page in an empty folder, and which ports stand for those that pages name;
    `more` is set besides.
    """
    ports = {there: embedded.free_port() for there in PORTS}
    for each in ("reader", "apart"):
        (folder / each).mkdir()
    own = _environment(url, name, ports) | more
    return Reader(folder / "reader", own, folder / "apart", stopping, _instead(url, ports)), ports


def _environment(url: str, name: str, ports: dict[int, int]) -> dict[str, str]:
    """Return what a reader has set before the page begins: nothing, but where things are on this
    machine.
    """
    # A drill needs pressure; all other pages are the same on a machine that others press.
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
    return os.environ | found


def _instead(url: str, ports: dict[int, int]) -> dict[str, str]:
    """Return what pages call the places of a machine that is theirs alone, and what these are
    here.
    """
    ways = ("localhost:{}", "127.0.0.1:{}", "port={}", "port {}")
    own = {way.format(there): way.format(here) for there, here in ports.items() for way in ways}
    return own | {"redis://localhost:6379": url.removesuffix("/0")}
