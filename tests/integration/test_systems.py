"""Systems without the modules and calls of Unix: a client works there."""

from __future__ import annotations

import os
import subprocess
import sys

from rlm_tasks import Client

WITHOUT_UNIX = """
import os, signal, sys
import celery.app.amqp, celery.result, kombu.transport.redis  # they look at sys.platform

for name in ("resource", "fcntl", "pwd", "grp", "termios", "syslog"):
    sys.modules[name] = None
for name in ("fork", "waitid", "register_at_fork", "sched_getaffinity", "killpg", "setsid"):
    delattr(os, name)
for name in ("SIGALRM", "SIGKILL", "SIGUSR1", "SIGHUP", "setitimer", "pthread_sigmask"):
    delattr(signal, name)

import rlm_tasks
for name in rlm_tasks.__all__:
    getattr(rlm_tasks, name)

with rlm_tasks.Client() as client:
    job = client.submit(operation="sum", items=range(1000))
    print(job.get(timeout=30), job.progress().done, client.plan(operation="sum", items=[1]).nodes)
    job.explain(), job.tree(), client.status(), client.health_check(detailed=True)
"""


def test_a_client_needs_no_module_of_unix(environment: dict[str, str], client: Client) -> None:
    client.check()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "499500 1000 1\n", done.stderr
