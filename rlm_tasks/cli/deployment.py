"""Commands for the deployment: its settings, the doctor, and the bundle for a bug report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.output import (
    answer,
    as_json_option,
    client_of,
    colored,
    print_json,
    printable,
    say,
    table,
    wide_option,
)

if TYPE_CHECKING:
    from rlm_tasks.settings.model import Settings
    from rlm_tasks.tones import Tone


# --- configuration ----------------------------------------------------------------------------


@click.group()
def config() -> None:
    """Settings: show, check, export, import."""


def _settings(ctx: click.Context) -> Settings:
    from rlm_tasks.settings.environment import settings

    own = getattr(getattr(ctx.obj, "app", None), "rlm_settings", None)
    return own or settings()


@config.command()
@click.option("--changed", is_flag=True, help="Only settings that differ from their default.")
@wide_option
@as_json_option
@click.pass_context
def show(ctx: click.Context, changed: bool, as_json: bool) -> None:
    """Show all settings and their defaults; secrets are hidden."""
    from rlm_tasks.settings.document import described

    rows = [each for each in described(_settings(ctx)) if each.changed or not changed]
    if as_json:
        print_json({each.variable: each.value for each in rows})
        return
    table(
        "Settings",
        ("variable", "value", "default", "description"),
        ((each.variable, _brief(each.value), _brief(each.default), each.about) for each in rows),
        stacked=True,
    )


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


@config.command()
@as_json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Check the settings.

    With an invalid setting no process starts; this command then only prints the mistake.
    """
    from rlm_tasks.worker.preflight import of_urls

    warnings = [
        f"{each.found}. {each.advice}" for each in of_urls(_settings(ctx)) if each.state != "ok"
    ]
    lines = [
        "Nothing is wrong with the settings; to check the deployment: rlm doctor",
        *(f"Warning: {each}" for each in warnings),
    ]
    answer({"issues": [], "warnings": warnings}, "\n".join(lines), as_json)


@config.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.pass_context
def export(ctx: click.Context, file: Path | None) -> None:
    """Write all settings except secrets as JSON, to a file or to the screen."""
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
    """Check exported settings, and print them as environment variables (for an env file)."""
    from rlm_tasks.settings.document import as_environment, import_config

    variables = as_environment(import_config(file.read()))
    if as_json:
        print_json(variables)
        return
    for name, value in variables.items():
        click.echo(printable(f"{name}={value}"))


@config.command()
@click.argument("file", type=click.File("rb"), required=False)
@wide_option
@as_json_option
def optimization(file: Any, as_json: bool) -> None:
    """Show the settings that the keys of an OptimizationConfig set: of a JSON file, or defaults."""
    from dataclasses import asdict

    from rlm_tasks.compat.optimization_config import OptimizationConfig

    keys = OptimizationConfig.import_config(file.read()) if file else OptimizationConfig()
    effects = keys.effects()
    if as_json:
        print_json([asdict(each) for each in effects])
        return
    table(
        "Optimization",
        ("key", "value", "sets", "note"),
        ((each.key, json.dumps(each.value), each.sets or "nothing", each.why) for each in effects),
        stacked=True,
    )


# --- health -----------------------------------------------------------------------------------


@click.command()
@as_json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Examine the deployment and print advice; exit code 1 for a fault."""
    from dataclasses import asdict

    from rlm_tasks.diagnosis.doctor import examine

    client = client_of(ctx)
    findings = examine(client, client.app)
    if as_json:
        print_json([asdict(each) for each in findings])
    else:
        for each in findings:
            mark = colored(f"{_MARKS[each.state]:>7}", _TONES[each.state])
            say(f"{mark}  {each.check}: {each.found}", hang=9)
            if each.advice:
                say(f"{'':9}{each.advice}")
    if any(each.state == "fault" for each in findings):
        ctx.exit(1)


_MARKS = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
_TONES: dict[str, Tone] = {"ok": "success", "warning": "warning", "fault": "danger"}


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--job", "job_id", help="Add the tree and the events of this job.")
@click.pass_context
def bundle(ctx: click.Context, file: Path | None, job_id: str | None) -> None:
    """Write one JSON document for a bug report; it has no item, result, parameter or secret."""
    from rlm_tasks.diagnosis.bundle import collect

    client = client_of(ctx)
    text = json.dumps(collect(client, client.app, job_id), indent=2, default=str)
    if file is None:
        click.echo(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")
        say(f"Written to {file}; read it before you send it")


COMMANDS = (config, doctor, bundle)
