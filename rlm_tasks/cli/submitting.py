"""Commands that take a request: submit it, or plan it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rlm_tasks.cli.job_ids import command, goes_on
from rlm_tasks.cli.outcomes import print_result
from rlm_tasks.cli.output import answer, as_json_option, client_of, print_json, say, table
from rlm_tasks.cli.watching import watch_to_the_end

if TYPE_CHECKING:
    from rlm_tasks.client.planning import PlannedRound

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _request(function: _Command) -> _Command:
    """Give a command the options of a request: a JSON file, or an operation and a file of lines."""
    options = (
        click.argument("request_file", type=click.File("r"), required=False),
        click.option("--operation", help="The operation that runs each line of --lines."),
        click.option("--lines", metavar="FILE", help="A text file; each line is an item."),
        click.option("--params", metavar="JSON", help="Parameters of the operation, as JSON."),
        click.option("--priority", help="critical, high, normal or low."),
        click.option("--continue-on-error", is_flag=True, help="A failed item fails only itself."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _read(request_file: Any, **flags: Any) -> Any:
    """Return the request of a command.  Raises InvalidRequest if it is given twice, or in part."""
    from rlm_tasks.errors import InvalidRequest

    given = {name: value for name, value in flags.items() if value}
    if not given:
        return _from_json(request_file or _stdin())
    if request_file is not None:
        advice = "a request file has the whole request; leave out the file, or this option"
        raise InvalidRequest(_option(next(iter(given))), next(iter(given.values())), advice)
    for name in ("operation", "lines"):
        if name not in given:
            advice = "give --operation NAME and --lines FILE together, or a request file"
            raise InvalidRequest(_option(name), None, advice)
    return _from_flags(given)


def _from_flags(given: dict[str, Any]) -> dict[str, Any]:
    from rlm_tasks.jobs.items import Lines

    request = {"operation": given.pop("operation"), "items": Lines(given.pop("lines"))}
    if "params" in given:
        given["params"] = _json("--params", given["params"])
    return {**request, **given}


def _from_json(file: Any) -> Any:
    from rlm_tasks.errors import InvalidRequest

    try:
        return json.load(file)
    except ValueError as error:
        raise InvalidRequest(
            "request", getattr(file, "name", "-"), f"is not JSON: {error}"
        ) from None


def _json(name: str, text: str) -> Any:
    from rlm_tasks.errors import InvalidRequest

    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(name, text, f"is not JSON: {error}") from None


def _stdin() -> Any:
    if sys.stdin.isatty():
        say("Type the request as JSON; Ctrl-D ends it. Or: --operation NAME --lines FILE", err=True)
    return sys.stdin


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@click.command()
@_request
@click.option(
    "--wait", "timeout", type=float, help="Wait this many seconds for the result and print it."
)
@click.option("--watch", "watched", is_flag=True, help="Show the progress until the job ends.")
@as_json_option
@click.pass_context
def submit(
    ctx: click.Context, /, timeout: float | None, watched: bool, as_json: bool, **request: Any
) -> None:
    """Submit a request: a JSON file, stdin, or --operation NAME --lines FILE."""
    job = client_of(ctx).submit(_read(**request))
    if timeout is None or watched:
        answer({"id": job.id}, job.id, as_json)
        if not watched and sys.stderr.isatty():
            say(f"Watch it: {command(ctx, 'watch', job.id)}", err=True)
    if watched:
        watch_to_the_end(ctx, job)
    elif timeout is not None:
        with goes_on(ctx, job):
            result = job.result(timeout)
        print_result(ctx, result, as_json)


@click.command()
@_request
@as_json_option
@click.pass_context
def plan(ctx: click.Context, /, as_json: bool, **request: Any) -> None:
    """Estimate a request: calls, tokens, money and time.  Takes the request as `submit` does.

    Nothing is submitted.
    """
    planned = client_of(ctx).plan(_read(**request))
    if as_json:
        print_json(planned.to_dict())
        return
    if planned.calls.p90:
        columns = (
            "round",
            "operation",
            "items",
            "calls",
            "calls p90",
            "tokens",
            "tokens p90",
            "money",
            "money p90",
        )
        table("Rounds", columns, map(_round, planned.rounds))
    say(str(planned))


def _round(planned: PlannedRound) -> tuple[Any, ...]:
    from rlm_tasks.words import figure

    money = map(figure, (planned.money.p50, planned.money.p90))
    return (
        planned.number,
        planned.operation,
        planned.items,
        planned.calls.p50,
        planned.calls.p90,
        planned.tokens.p50,
        planned.tokens.p90,
        *money,
    )


COMMANDS = (submit, plan)
