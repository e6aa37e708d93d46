"""Run many commands in one process, as a user's shell does one after the other.

Arguments: lines on stdin, one command each, as JSON lists.  The commands print as always.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import click

from rlm_tasks.cli import rlm
from tests.integration.conftest import ROOT

LEFT_OUT = {
    *("bundle", "cancel", "demo", "drop", "export", "force", "import", "plan", "release", "replay"),
    *("optimization", "reset", "retry", "serve", "show", "submit", "watch"),
}
"""Commands that change something, that ask for more, or that the tests run by hand."""


def readers(jobs: Sequence[str]) -> list[list[str]]:
    """Return the command lines of all commands that only read: for each job, and as JSON, too."""
    found = []
    for path, command in _walk(rlm, ()):
        if path[-1] in LEFT_OUT:
            continue
        needs_job = any(isinstance(each, click.Argument) for each in command.params)
        options = {option for each in command.params for option in each.opts}
        lines = [[*path, job] for job in jobs] if needs_job else [[*path]]
        found += lines
        found += [[*line, "--json"] for line in lines if "--json" in options]
    return found


def _walk(group: click.Group, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += _walk(command, (*path, name))
            if not command.invoke_without_command:
                continue
        found.append(((*path, name), command))
    return found


def run_all(
    environment: Mapping[str, str], lines: Sequence[Sequence[str]], output: int = subprocess.PIPE
) -> str:
    """Run commands in a process of its own; return what they print, on stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.all_commands"],
        input="".join(f"{json.dumps(line)}\n" for line in lines).encode(),
        stdout=output,
        stderr=subprocess.STDOUT if output == subprocess.PIPE else output,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout
    return (done.stdout or b"").decode()


@contextmanager
def terminal() -> Iterator[tuple[int, list[bytes]]]:
    """Yield a terminal to write to, of 80 columns, and a list that has its bytes in the end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    found: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # its other end is closed
            while part := os.read(ours, 65_536):
                found.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield theirs, found
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)


def main() -> None:
    """Run the commands of stdin."""
    from rlm_tasks.celery import app

    lines = [json.loads(line) for line in sys.stdin]
    for line in lines:
        click.echo(f"$ rlm {' '.join(line)!a}")
        try:
            rlm.main(line, prog_name="rlm", obj=SimpleNamespace(app=app))
        except SystemExit as end:
            if end.code == 2:
                click.echo(f"!! exit code 2 of {line!a}")


if __name__ == "__main__":
    main()
