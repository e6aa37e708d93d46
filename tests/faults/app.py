"""The platform's app with a fault at one crash point; the environment selects both.

``FAULT_POINT`` names the crash point and ``FAULT_DO`` the fault.  The fault happens once: when any
process reaches the point for the ``FAULT_NTH`` time.  In ``FAULT_FOLDER`` processes share files.
`Cell.worker` starts it; begin with `reached`."""

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
    """Kill this process, as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_worker() -> None:
    """Suspend the whole worker with SIGSTOP, this process last."""
    import psutil

    main = psutil.Process(os.getppid())
    for each in (main, *main.children()):
        if each.pid != os.getpid():
            os.kill(each.pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)


def term_worker() -> None:
    """Ask the main process to stop, and continue."""
    os.kill(os.getppid(), signal.SIGTERM)


def term_group() -> None:
    """Ask the whole process group to stop, with this process, and continue."""
    os.killpg(os.getpgrp(), signal.SIGTERM)


def exceed() -> None:
    """Exceed a time limit."""
    time.sleep(60)


def starve() -> None:
    """Request more memory than any machine has."""
    bytearray(2**46)


def hold() -> None:
    """Wait until the test creates the file `go`, at most 30 s."""
    until = time.monotonic() + 30
    while not (_FOLDER / "go").exists() and time.monotonic() < until:
        time.sleep(0.005)


FAULTS = {
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
    """Cause the fault, once, when the point is reached for the nth time."""
    if point != _POINT:
        return
    counter = os.open(_FOLDER / "count", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(counter, b".")
    nth = os.fstat(counter).st_size
    os.close(counter)
    if nth == _NTH:
        (_FOLDER / "reached").touch()
        FAULTS[_DO]()


app.rlm_runtime().reached = reached
