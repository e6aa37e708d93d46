"""``celery -A rlm_tasks rlm ...``: jobs, and the platform they run on, from the command line.

A file for each subject; `output` says how all of them answer.  None needs a worker that is alive.
"""

from __future__ import annotations

import gc
from typing import Any

import click

from rlm_tasks.cli import demo, deployment, jobs, platform, quarantine
from rlm_tasks.cli.output import Polite


@click.group(cls=Polite, name="rlm")
@click.pass_context
def rlm(_ctx: click.Context, /, **_: Any) -> None:
    """Jobs that split themselves: submit, watch, explain, cancel; and how the platform stands."""
    gc.freeze()  # half of what a command takes would go into looking through Celery's modules at its exit


for subject in (jobs, quarantine, platform, deployment, demo):
    for command in subject.COMMANDS:
        rlm.add_command(command)
