"""The commands ``celery -A rlm_tasks rlm ...``: jobs, the platform, the deployment and a demo.

Celery loads the group `rlm` as a plug-in.  Each subject is a module with its COMMANDS; `output` has
the forms of all answers.  No command needs a live worker.
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
    """Jobs that split themselves: submit, watch, explain, cancel; and the state of the platform."""
    gc.freeze()  # a last collection over Celery's modules would take half of a command's time


for subject in (jobs, quarantine, platform, deployment, demo):
    for command in subject.COMMANDS:
        rlm.add_command(command)
