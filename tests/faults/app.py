"""The platform's app with a hook at its crash points; what happens there comes from the
environment.

``FAULT_POINT`` names the point, ``FAULT_DO`` what happens when it is reached the ``FAULT_NTH``
time, by any process; it happens once.  ``FAULT_FOLDER`` is where processes tell each other."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from rlm_tasks.celery import app
from rlm_tasks.engine.crashpoints import CrashPoint
from tests.faults.ops import kill_worker

_POINT, _DO = os.environ["FAULT_POINT"], os.environ["FAULT_DO"]
_NTH = int(os.environ.get("FAULT_NTH", "1"))
_FOLDER = Path(os.environ["FAULT_FOLDER"])


def kill_process() -> None:
    """As the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_worker() -> None:
    """Stop the whole worker in its tracks, this process last."""
    import psutil

    main = psutil.Process(os.getppid())
    for each in (main, *main.children()):
        if each.pid != os.getpid():
            os.kill(each.pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)


def term_worker() -> None:
    """Ask the main process to stop, and go on."""
    os.kill(os.getppid(), signal.SIGTERM)


def term_group() -> None:
    """Ask the whole process group to stop, this process included, and go on."""
    os.killpg(os.getpgrp(), signal.SIGTERM)


def exceed() -> None:
    """Run into a time limit."""
    time.sleep(60)


def starve() -> None:
    """Ask for more memory than any machine has."""
    bytearray(2**46)


def hold() -> None:
    """Wait for the test to do its worst."""
    until = time.monotonic() + 30
    while not (_FOLDER / "go").exists() and time.monotonic() < until:
        time.sleep(0.005)


DEEDS = {
    each.__name__: each
    for each in (
        kill_process,
        kill_worker,
        stop_worker,
        term_worker,
        term_group,
        exceed,
        starve,
        hold,
    )
}


def reached(point: CrashPoint) -> None:
    """Do it, once, when the point is reached for the nth time."""
    if point != _POINT:
        return
    counter = os.open(_FOLDER / "count", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(counter, b".")
    nth = os.fstat(counter).st_size
    os.close(counter)
    if nth == _NTH:
        (_FOLDER / "reached").touch()
        DEEDS[_DO]()


app.rlm_runtime().reached = reached
