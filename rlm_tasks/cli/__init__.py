"""The commands ``celery -A rlm_tasks rlm ...``, for jobs and for the platform they run on.

Celery's command line loads `rlm` by its entry point.  Each subject has a module, and `output` has
the form of all answers.  No command needs a live worker.  Begin with `jobs`.
"""

from __future__ import annotations

import gc
from typing import Any

import click

from rlm_tasks.cli import (
    demo,
    deployment,
    jobs,
    outcomes,
    platform,
    quarantine,
    submitting,
    watching,
)
from rlm_tasks.cli.output import Polite


@click.group(cls=Polite, name="rlm")
@click.pass_context
def rlm(_ctx: click.Context, /, **_: Any) -> None:
    """Jobs that split themselves: submit, watch, explain, cancel; and the state of the platform."""
    gc.freeze()  # a last collection over Celery's modules would take half of a command's time


for subject in (submitting, jobs, watching, outcomes, quarantine, platform, deployment, demo):
    for command in subject.COMMANDS:
        rlm.add_command(command)
