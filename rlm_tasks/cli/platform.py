"""Commands for the platform: pressure, breakers, limits, endpoints, queues, operations, alerts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rlm_tasks.cli.output import (
    answer,
    as_json_option,
    client_of,
    print_json,
    say,
    table,
    wide_option,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlm_tasks.cli.tables import Cell, Row
    from rlm_tasks.client.client import Client
    from rlm_tasks.client.platform_status import PlatformStatus
    from rlm_tasks.tones import Tone


@click.command()
@wide_option
@as_json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the platform at a glance: level, hosts, active work, operations."""
    client = client_of(ctx)
    platform = client.status()
    if as_json:
        print_json(platform.to_dict())
        return
    say(_sentence(platform, client) + "\n")
    _show_hosts(platform)
    say("")
    table("At work", ("operation", "nodes"), sorted(platform.active.items()))
    say("")
    _show_operations(platform.operations)


def _sentence(platform: PlatformStatus, client: Client) -> str:
    from rlm_tasks.installation import command_of

    return platform.sentence(command_of(client.app))


def _show_hosts(platform: PlatformStatus) -> None:
    columns = ("worker", "level", "busy", "CPU", "memory", "queues", "why")
    rows: Iterable[Row] = (
        (
            host.worker,
            _level(host.level) if platform.enabled else "off",
            f"{host.busy} of {host.slots}",
            f"{host.sample.cpu_pct:.0f} %" if host.sample else "?",
            f"{host.sample.memory_pct:.0f} %" if host.sample else "?",
            ", ".join(host.queues),
            host.why,
        )
        for host in platform.hosts
    )
    table("Workers", columns, rows, minor=("queues", "memory", "CPU", "busy"))


def _level(level: int) -> tuple[str, Tone]:
    from resilience.degradation import Level
    from rlm_tasks.tones import level_tone

    return Level(level).label, level_tone(Level(level))


# --- pressure ---------------------------------------------------------------------------------


@click.group(invoke_without_command=True)
@wide_option
@as_json_option
@click.pass_context
def pressure(ctx: click.Context, as_json: bool) -> None:
    """Show the pressure level and its cause; see `force`, `release` and `history`."""
    if ctx.invoked_subcommand is not None:
        return
    client = client_of(ctx)
    platform = client.status()
    if as_json:
        names = (
            "level",
            "enabled",
            "why",
            "forced",
            "monitored",
            "rising_to",
            "desired_workers",
            "strategies",
            "hosts",
        )
        print_json({name: value for name, value in platform.to_dict().items() if name in names})
        return
    say(_sentence(platform, client))
    if platform.known:
        say(f"Left out at this level: {', '.join(platform.strategies) or 'nothing'}")
    say("")
    _show_hosts(platform)


@pressure.command()
@click.argument("level")
@click.option(
    "--for",
    "for_s",
    default=600.0,
    show_default=True,
    help="Seconds until the drill ends by itself.",
)
@as_json_option
@click.pass_context
def force(ctx: click.Context, level: str, for_s: float, as_json: bool) -> None:
    """Begin a drill: all workers act on a level (normal, elevated, high, critical, emergency)."""
    from rlm_tasks.words import duration

    client_of(ctx).pressure.force(level, for_s)
    answer(
        {"forced": level, "for_s": for_s},
        f"All workers act on {level}, within a second, for {duration(for_s)}",
        as_json,
    )


@pressure.command()
@as_json_option
@click.pass_context
def release(ctx: click.Context, as_json: bool) -> None:
    """End a drill."""
    was = client_of(ctx).pressure.release()
    answer({"released": was}, "The drill has ended" if was else "There was no drill", as_json)


@pressure.command()
@click.option(
    "--limit",
    default=20,
    show_default=True,
    help="Number of measurements, the newest first.",
)
@wide_option
@as_json_option
@click.pass_context
def history(ctx: click.Context, limit: int, as_json: bool) -> None:
    """Show recent measurements of the monitor."""
    from msgspec import to_builtins

    client = client_of(ctx)
    measurements = client.pressure.history(limit)
    if as_json:
        print_json(to_builtins(measurements))
        return
    from rlm_tasks.words import age, clock

    columns = ("when", "at", "level", "busy", "CPU", "memory", "messages", "why")
    now = client.ledger.clock()
    rows = (
        (
            age(now - each.at),
            clock(each.at),
            _level(each.level),
            f"{each.busy} of {each.slots}",
            f"{each.cpu_pct:.0f} %",
            f"{each.memory_pct:.0f} %",
            sum(queue.depth for queue in each.queues.values()),
            each.why,
        )
        for each in measurements
    )
    minor = ("memory", "at", "CPU", "messages", "busy")
    table("Recent pressure", columns, rows, minor=minor)


# --- breakers, limits, queues -----------------------------------------------------------------


@click.group(invoke_without_command=True)
@wide_option
@as_json_option
@click.pass_context
def breakers(ctx: click.Context, as_json: bool) -> None:
    """Show all circuit breakers; see `reset`."""
    if ctx.invoked_subcommand is not None:
        return
    client = client_of(ctx)
    states = client.breakers.status()
    if as_json:
        print_json(states)
        return
    from rlm_tasks.tones import BREAKER_TONES
    from rlm_tasks.words import age, next_probe

    now = client.ledger.clock()
    rows = (
        (
            name,
            (at["state"], BREAKER_TONES[at["state"]]),
            at["failure_count"],
            age(now - at["last_failure_time"]) if at["last_failure_time"] else "never",
            next_probe(at["state"], at["retry_after_s"]),
        )
        for name, at in states.items()
    )
    columns = ("service", "state", "failures", "last failure", "next probe")
    table("Breakers", columns, rows, minor=("failures", "last failure"))


@breakers.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="All breakers.")
@as_json_option
@click.pass_context
def reset(ctx: click.Context, name: str | None, every: bool, as_json: bool) -> None:
    """Close a breaker, or all; calls are allowed at once."""
    from rlm_tasks.errors import InvalidRequest

    client = client_of(ctx)
    if bool(name) == every:
        raise InvalidRequest("name", name, "name one breaker, or use --all")
    if name and name not in (known := client.breakers.names()):
        raise InvalidRequest(
            "name", name, f"there is no such breaker; there are: {', '.join(known) or 'none'}"
        )
    closed = client.breakers.reset(name)
    answer({"closed": closed}, f"Closed: {', '.join(closed) or 'none'}", as_json)


@click.group(invoke_without_command=True)
@wide_option
@as_json_option
@click.pass_context
def limits(ctx: click.Context, as_json: bool) -> None:
    """Show how full rate limits and bulkheads are; see `release`.

    They are those of models and operations, of live workers and of this process.
    """
    if ctx.invoked_subcommand is not None:
        return
    reports = client_of(ctx).limits()
    if as_json:
        print_json([{**asdict(each), "fill": each.fill} for each in reports])
        return
    from rlm_tasks.words import duration, figure

    rows: Iterable[Row] = (
        (
            each.service,
            each.name,
            f"{figure(each.used)} of {figure(each.limit)}",
            f"in {duration(each.per_s)}" if each.per_s else "at once",
            (f"{each.fill:.0%}", "warning" if each.fill >= 1 else ""),
            each.waiting,
            f"for {duration(each.hold_s)}" if each.hold_s else "",
        )
        for each in reports
    )
    columns = ("service", "limit", "used", "per", "full", "in line", "held by the provider")
    minor = ("held by the provider", "in line", "per", "used")
    table("Limits", columns, rows, minor=minor)


@limits.command("release")
@click.argument("name")
@as_json_option
@click.pass_context
def release_limit(ctx: click.Context, name: str, as_json: bool) -> None:
    """End the pause of a limit that its provider asked for; calls are made at once."""
    from rlm_tasks.words import duration

    rest_s = client_of(ctx).release_limit(name)
    ended = f"The pause of {name} has ended, {duration(rest_s)} early"
    said = ended if rest_s else "There is no pause"
    answer({"released": name, "rest_s": rest_s}, said, as_json)


@click.command()
@click.option(
    "--check",
    is_flag=True,
    help="Check them now, from this machine and with its keys; workers do not get the results.",
)
@wide_option
@as_json_option
@click.pass_context
def endpoints(ctx: click.Context, check: bool, as_json: bool) -> None:
    """Show the endpoints of models: the results of workers' checks, and their breakers."""
    client = client_of(ctx)
    reports = client.endpoints()
    if check:
        from rlm_tasks.llm.reports import checked_now

        reports = checked_now(client.settings.llm, reports)
    if as_json:
        print_json([asdict(each) for each in reports])
        return
    from rlm_tasks.tones import BREAKER_TONES
    from rlm_tasks.words import age, duration, figure

    rows: Iterable[Row] = (
        (
            each.name,
            ("healthy", "success") if each.healthy else ("UNHEALTHY", "danger"),
            (each.breaker, BREAKER_TONES.get(each.breaker, "")),
            each.strikes,
            "" if each.latency_ms is None else duration(each.latency_ms / 1000),
            "never" if each.checked_s_ago is None else age(each.checked_s_ago),
            figure(each.weight),
            each.host or "OPENAI_BASE_URL",
            ", ".join(each.models) or "all",
            each.why,
        )
        for each in reports
    )
    columns = (
        *("endpoint", "state", "breaker", "strikes", "latency", "checked"),
        *("weight", "host", "models", "why"),
    )
    minor = ("weight", "strikes", "host", "models", "checked", "latency", "breaker")
    table("Endpoints", columns, rows, minor=minor)


@click.command()
@wide_option
@as_json_option
@click.pass_context
def queues(ctx: click.Context, as_json: bool) -> None:
    """Show the number of waiting messages in each queue, and the age of the oldest."""
    client = client_of(ctx)
    reports, consumers = client.queues(), client.pressure.consumers()
    if as_json:
        print_json(
            [
                {
                    "queue": name,
                    "depth": at.depth,
                    "oldest_s": at.oldest_s,
                    "workers": consumers.get(name, []),
                }
                for name, at in reports.items()
            ]
        )
        return
    from rlm_tasks.words import duration

    rows: Iterable[Row] = (
        (
            name,
            at.depth,
            "" if at.oldest_s is None else duration(at.oldest_s),
            _named(consumers.get(name, [])),
        )
        for name, at in reports.items()
    )
    columns = ("queue", "messages", "oldest", "consumed by")
    table("Queues", columns, rows, minor=("oldest",))


def _named(workers: list[str]) -> Cell:
    from rlm_tasks.words import NAMED

    if not workers:
        return "NOBODY", "danger"
    more = len(workers) - NAMED
    return ", ".join(workers[:NAMED]) + (f", {more:,} more" if more > 0 else "")


# --- operations and alerts --------------------------------------------------------------------


@click.command()
@wide_option
@as_json_option
@click.pass_context
def operations(ctx: click.Context, as_json: bool) -> None:
    """Show the cost of each operation: executions, success, memory, duration."""
    costs = client_of(ctx).status().operations
    if as_json:
        print_json(costs)
    else:
        _show_operations(costs)


def _show_operations(costs: list[dict[str, Any]]) -> None:
    from rlm_tasks.tones import BREAKER_TONES
    from rlm_tasks.words import duration

    rows = (
        (
            each["executor_id"],
            each["total_executions"],
            each["failed_executions"],
            f"{each['success_rate_percent']:g} %",
            duration(each["avg_duration_ms"] / 1000),
            _trend(each),
            f"{each['avg_memory_mb']:.0f} MB",
            f"{each['peak_memory_mb']:.0f} MB",
            (state := each["circuit_breaker_state"], BREAKER_TONES[state]),
        )
        for each in costs
    )
    columns = (
        *("operation", "items", "failed", "success", "average", "trend"),
        *("memory", "peak", "breaker"),
    )
    minor = ("memory", "success", "peak", "trend", "breaker", "average")
    table("Operations", columns, rows, minor=minor)


def _trend(operation: dict[str, Any]) -> tuple[str, Tone]:
    """Return the change of the duration of items in percent; '' without earlier ones."""
    change = operation["change_percent"]
    if operation["slower"]:
        return f"{change:+.0f} % SLOWER", "warning"
    return "" if change is None else f"{change:+.0f} %", ""


@click.command()
@click.option("--limit", default=20, show_default=True, help="Number of alerts, the newest first.")
@wide_option
@as_json_option
@click.pass_context
def alerts(ctx: click.Context, limit: int, as_json: bool) -> None:
    """Show alerts, the newest first, with their number in all, in a day and in an hour."""
    client = client_of(ctx)
    known = client.alerts
    latest, summary = known.history(limit), known.summary()
    if as_json:
        counts = {name: value for name, value in summary.items() if name != "recent_alerts"}
        print_json({**counts, "alerts": [each.fields() for each in latest]})
        return
    from rlm_tasks.words import age, clock

    now = client.ledger.clock()
    rows = (
        (
            age(now - each.at),
            clock(each.at),
            (each.severity.label, _SEVERITY_TONES.get(each.severity.label, "")),
            each.kind,
            each.subject,
            each.message,
        )
        for each in latest
    )
    columns = ("when", "at", "severity", "kind", "about", "what")
    table("Alerts", columns, rows, minor=("at", "kind", "about"))
    say(
        f"{summary['total_alerts']:,} in all, {summary['last_24_hours']:,} in the last day, "
        f"{summary['last_hour']:,} in the last hour"
    )


_SEVERITY_TONES: dict[str, Tone] = {
    "warning": "warning",
    "error": "danger",
    "critical": "danger",
}
COMMANDS = (status, pressure, breakers, limits, endpoints, queues, operations, alerts)
