"""The deployment: what is configured, what is wrong with it, and what to send with a bug report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.output import answer, as_json_option, client_of, print_json, table

if TYPE_CHECKING:
    from rlm_tasks.settings.model import Settings


# --- configuration ----------------------------------------------------------------------------


@click.group()
def config() -> None:
    """Settings: show, check, export, import."""


def _settings(ctx: click.Context) -> Settings:
    from rlm_tasks.settings.environment import settings

    own = getattr(getattr(ctx.obj, "app", None), "rlm_settings", None)
    return own or settings()


@config.command()
@click.option("--changed", is_flag=True, help="Only what is not at its default.")
@as_json_option
@click.pass_context
def show(ctx: click.Context, changed: bool, as_json: bool) -> None:
    """Show every setting and its default; secrets are hidden."""
    from rlm_tasks.settings.document import described

    rows = [each for each in described(_settings(ctx)) if each.changed or not changed]
    if as_json:
        print_json({each.variable: each.value for each in rows})
        return
    table(
        "Settings",
        ("variable", "value", "default", "what it does"),
        ((each.variable, _brief(each.value), _brief(each.default), each.about) for each in rows),
    )


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


@config.command()
@as_json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Say what is wrong with the settings; a process with a wrong one does not start, and neither
    would this.
    """
    from rlm_tasks.worker.preflight import of_urls

    warnings = [
        f"{each.found}. {each.advice}" for each in of_urls(_settings(ctx)) if each.state != "ok"
    ]
    told = [
        "Nothing is wrong with the settings; what runs with them: rlm doctor",
        *(f"Warning: {each}" for each in warnings),
    ]
    answer({"issues": [], "warnings": warnings}, "\n".join(told), as_json)


@config.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.pass_context
def export(ctx: click.Context, file: Path | None) -> None:
    """Write all settings as JSON, to a file or to the screen; what holds a secret is left out."""
    from rlm_tasks.settings.document import export_config

    text = export_config(_settings(ctx))
    if file is None:
        click.echo(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")


@config.command("import")
@click.argument("file", type=click.File("r"), default="-")
@as_json_option
def import_(file: Any, as_json: bool) -> None:
    """Check exported settings, and print the environment variables that say the same (for an env
    file).
    """
    from rlm_tasks.settings.document import as_environment, import_config

    variables = as_environment(import_config(file.read()))
    answer(variables, "\n".join(f"{name}={value}" for name, value in variables.items()), as_json)


@config.command()
@click.argument("file", type=click.File("rb"), required=False)
@as_json_option
def optimization(file: Any, as_json: bool) -> None:
    """Show what the keys of an OptimizationConfig set here, those of a JSON file or the
    defaults.
    """
    from dataclasses import asdict

    from rlm_tasks.compat.optimization_config import OptimizationConfig

    found = (
        OptimizationConfig.import_config(file.read()) if file else OptimizationConfig()
    ).effects()
    if as_json:
        print_json([asdict(each) for each in found])
        return
    table(
        "Optimization",
        ("key", "value", "sets", "why nothing, or what to know"),
        ((each.key, json.dumps(each.value), each.sets or "nothing", each.why) for each in found),
    )


# --- health -----------------------------------------------------------------------------------


@click.command()
@as_json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Examine the deployment, and say what to do; exit code 1 for a fault."""
    from dataclasses import asdict

    from rlm_tasks.diagnosis.doctor import examine

    client = client_of(ctx)
    found = examine(client, client.app)
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        for each in found:
            click.echo(f"{_MARKS[each.state]} {each.check}: {each.found}")
            if each.advice:
                click.echo(f"         {each.advice}")
    if any(each.state == "fault" for each in found):
        ctx.exit(1)


_MARKS = {"ok": "     ok ", "warning": "WARNING ", "fault": "  FAULT "}


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--job", "job_id", help="With the tree and the event log of this job.")
@click.pass_context
def bundle(ctx: click.Context, file: Path | None, job_id: str | None) -> None:
    """Write what a bug report needs as one JSON document: no item, result, parameter or secret is
    in it.
    """
    from rlm_tasks.diagnosis.bundle import collect

    client = client_of(ctx)
    text = json.dumps(collect(client, client.app, job_id), indent=2, default=str)
    if file is None:
        click.echo(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")
        click.echo(f"Written to {file}; look at it before you send it")


COMMANDS = (config, doctor, bundle)
