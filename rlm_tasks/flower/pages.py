"""The contents of each tab, as cards and tables: plain data that a script in the browser draws.

`views` calls the functions in `PAGES`; they know neither Flower nor HTML.  A page shows a request's
operation, priority and description.  No page shows an item, a parameter or a result.  A message of
a failure is shown only with RLM_SHOW_MESSAGES.  Begin with `Picture` and `PAGES`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.degradation import Level
from rlm_tasks.errors import JobNotFound
from rlm_tasks.installation import command_of
from rlm_tasks.jobs.endings import ENDINGS, shown, shown_progress, shown_rate
from rlm_tasks.jobs.item_failures import alike
from rlm_tasks.results import COLUMNS, Progress, Status, rows
from rlm_tasks.telemetry.exposition import BREAKER_STATES
from rlm_tasks.tones import BREAKER_TONES, Tone, level_tone
from rlm_tasks.words import age, duration, figure, next_probe
from rlm_tasks.words import count as counted

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client
    from rlm_tasks.client.job import Job
    from rlm_tasks.client.platform_status import PlatformStatus
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.results import ItemFailure, Tree
    from rlm_tasks.telemetry.limit_reports import LimitReport
    from scheduler.board import HostReport

TABS = {
    "jobs": "Jobs",
    "pressure": "Pressure",
    "breakers": "Breakers",
    "limits": "Limits",
    "queues": "Queues",
}
JOBS, NODES, EVENTS, SAMPLES = 50, 300, 30, 120
"""The most that are shown: of jobs, of a job's nodes and events, of the monitor's samples."""
FAILURES, INDEXES = 1000, 20
"""The most failures that are counted, and the most indexes shown of each kind."""
MESSAGES = 20
"""The most failures whose messages are shown."""

UNKNOWN = "not known"
"""The value of a card while no worker reports."""


@dataclass(frozen=True, slots=True)
class Action:
    """A button: its action, the object of the action, and a question to confirm it."""

    name: str
    title: str
    label: str = ""  # its full name, for screen readers
    about: dict[str, str] = field(default_factory=dict)
    confirm: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table that needs more than plain text."""

    text: str
    tone: Tone = ""
    note: str = ""  # a smaller line below
    badge: bool = False  # draw the text as a state
    link: str = ""  # the id of a job
    bar: float | None = None  # 0 to 1
    indent: int = 0
    action: Action | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """One figure."""

    label: str
    value: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, or a sentence (`empty`) where there are none."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    empty: str
    minor: Sequence[str] = ()  # columns that a narrow screen hides


@dataclass(frozen=True, slots=True)
class Chart:
    """A level over time; each point is a time in seconds and the number of a level."""

    title: str
    levels: Sequence[str]
    points: Sequence[tuple[float, int]]
    drill: str = ""  # the level that is forced now


@dataclass(frozen=True, slots=True)
class Picture:
    """One page."""

    sentence: str
    heading: str = ""
    about: str = ""
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    chart: Chart | None = None
    actions: Sequence[Action] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


# --- jobs -------------------------------------------------------------------------------------


def jobs(client: Client) -> Picture:
    """Return the newest jobs, the newest first."""
    listed = client.listed(JOBS)
    count = Counter(progress.status for _, progress in listed)
    open_jobs = client.at_work()
    failed = sum(count[status] for status, ending in ENDINGS.items() if ending.is_failure)
    cards = [
        Card("At work", str(len(open_jobs)), "active"),
        Card("Nodes running", str(sum(each.running for each in open_jobs))),
        Card("Succeeded", str(count[Status.SUCCEEDED]), "success"),
        Card("Failed", str(failed), "danger" if failed else ""),
    ]
    columns = (
        "Job",
        "Id",
        "Priority",
        "Status",
        "Progress",
        "Items",
        "Failed",
        "Nodes",
        "Time",
        "",
    )
    minor = ("Id", "Priority", "Items", "Failed", "Nodes", "Time", "")
    rows = [_job_row(spec, progress) for spec, progress in listed]
    table = Table(
        title="", columns=columns, rows=rows, empty="No job has been submitted yet.", minor=minor
    )
    return Picture(f"The newest {counted(len(listed), 'job')}.", cards=cards, tables=[table])


def _job_row(spec: JobSpec, at: Progress) -> list[str | Cell]:
    return [
        Cell(spec.operation, note=spec.description, link=spec.job),
        _short(spec.job),
        spec.priority,
        Cell(*shown_progress(at), badge=True),
        _share(at),
        f"{at.total:,}",
        Cell(f"{at.failed:,}", "danger" if at.failed else ""),
        f"{at.nodes:,}",
        Cell(duration(at.elapsed_s), note=_remaining(at)),
        "" if at.status.final else Cell("", action=_cancel(spec.job)),
    ]


def _share(at: Progress) -> Cell:
    """Return the share of items that ran; skipped ones, as of a cancelled job, do not count."""
    share = (at.done + at.failed) / at.total if at.total else 1.0
    return Cell(f"{share:.0%}", shown(at.status, at.failed)[1], bar=share)


def _remaining(at: Progress) -> str:
    return "" if at.status.final or at.eta_s is None else f"{duration(at.eta_s)} left"


def _cancel(job: str) -> Action:
    return Action(
        name="cancel",
        title="Cancel",
        label=f"Cancel job {_short(job)}",
        about={"job": job},
        confirm=f"Cancel job {job} with all of its nodes?",
    )


def _retry(job: str) -> Action:
    return Action(
        name="retry",
        title="Retry failed items",
        label="",
        about={"job": job},
        confirm="Open a new job on the failed items?",
    )


def job(client: Client, job_id: str) -> Picture:
    """Return one job: its explanation, failures, receipt, spending, tree and events.

    The address may have the beginning of an id.  Raises JobNotFound, InvalidRequest.
    """
    handle, shows = client.job(job_id), client.settings.show_messages
    job_id = handle.id
    if (spec := client.ledger.spec(job_id)) is None:
        raise JobNotFound(job_id)
    at = handle.progress()
    cards = [
        Card("Status", *shown_progress(at)),
        Card(f"Done, of {counted(at.total, 'item')}", f"{at.done:,}"),
        Card("Failed", f"{at.failed:,}", "danger" if at.failed else ""),
        Card("Time", duration(at.elapsed_s)),
    ]
    actions = [] if at.status.final else [_cancel(job_id)]
    if at.status.final and at.failed:
        actions.append(_retry(job_id))
    return Picture(
        sentence=f"{handle.explain(message=shows)}{_pace(at)}",
        heading=spec.description or spec.operation,
        about=f"{f'{spec.operation} · ' if spec.description else ''}"
        f"{spec.priority} priority · {job_id}",
        cards=cards,
        tables=[
            *_failures(handle.failures(), at.failed, shows=shows),
            _receipt(handle),
            *_spent(handle),
            _tree(handle.tree(NODES, message=shows)),
            _log(handle),
        ],
        actions=actions,
    )


def _pace(at: Progress) -> str:
    """Return the rate and the remaining time; '' while unknown, and for an idle job."""
    if not (rate := shown_rate(at)):
        return ""
    parts = (f"{counted(round(rate, 1), 'item')} per second", _remaining(at))
    return f" {', '.join(filter(None, parts))}."


def _tree(tree: Tree) -> Table:
    rows: list[list[str | Cell]] = [
        [
            Cell(node.id, indent=node.depth),
            f"{node.lo:,} to {node.hi:,}",
            f"{node.worked:,}",
            Cell(node.state, _NODE_TONES.get(node.state, ""), badge=True),
            duration(node.duration_ms / 1000),
            node.worker,
            node.why,
        ]
        for node in tree
    ]
    columns = ("Node", "Items", "Ran", "State", "Time", "Worker", "Why")
    return Table(
        title=_counted("Tree", tree.total, "node", NODES, which="newest"),
        columns=columns,
        rows=rows,
        empty="No node yet.",
        minor=("Ran", "Time", "Worker"),
    )


_NODE_TONES: dict[str, Tone] = {
    "running": "active",
    "parked": "warning",
    "done": "success",
    "cut": "success",
}


def _failures(failures: Sequence[ItemFailure], failed: int, *, shows: bool) -> list[Table]:
    """Return the failures, one row for each type and code; at most the first thousand items.

    With `shows` another table has the messages of the first ones.
    """
    rows: list[list[str | Cell]] = [
        [
            type,
            code,
            f"{len(indexes):,}",
            ", ".join(f"{each:,}" for each in indexes[:INDEXES])
            + (", …" if len(indexes) > INDEXES else ""),
        ]
        for type, code, indexes in alike(failures)
    ]
    title = _counted("Failures", failed, "item", FAILURES)
    kinds = Table(title, ("Type", "Code", "Items", "Which"), rows, "No item has failed.")
    return [kinds, _messages(failures, failed)] if shows and failures else [kinds]


def _messages(failures: Sequence[ItemFailure], failed: int) -> Table:
    rows: list[list[str | Cell]] = [
        [f"{each.index:,}", each.where, Cell(f"{each.type}: {each.message}", note=each.traceback)]
        for each in failures[:MESSAGES]
    ]
    title = _counted("Messages", failed, "item", MESSAGES)
    return Table(title, ("Item", "Place", "Message"), rows, "", minor=("Place",))


def _receipt(handle: Job) -> Table:
    rows = [[each.strategy, each.level, f"{each.items:,}"] for each in handle.receipt()]
    return Table(
        "Receipt",
        ("Left out", "Under", "Items"),
        rows,
        "Nothing was left out under pressure.",
    )


def _spent(handle: Job) -> list[Table]:
    """Return the cost of calls to models; no table for a job that makes none."""
    spent = handle.spent()
    if not spent:
        return []
    columns = [each.capitalize() for each in COLUMNS]
    return [Table("Calls to models", columns, rows(spent), "None yet.")]


def _log(handle: Job) -> Table:
    events = handle.events()
    rows = [[_clock(each.at), each.event, each.detail] for each in events[-EVENTS:]]
    return Table(
        _counted(title="Events", number=len(events), noun="event", most=EVENTS, which="last"),
        ("At", "Event", "About"),
        rows,
        "Nothing yet.",
    )


def _counted(title: str, number: int, noun: str, most: int, which: str = "first") -> str:
    """Return a title with the number of rows, and the number that is shown."""
    if not number:
        return title
    rest = f", the {which} {most}" if number > most else ""
    return f"{title}: {counted(number, noun)}{rest}"


# --- the platform -----------------------------------------------------------------------------


def pressure(client: Client) -> Picture:
    """Return the level now and over time, and the hosts."""
    status, command = client.status(), command_of(client.app)
    level, used = Level[status.level.upper()], status.resource_usage
    cards = [
        Card("Level", *_level(status, level)),
        Card("CPU", f"{used['cpu_percent']:.0f} %" if status.hosts else UNKNOWN),
        Card("Memory", f"{used['memory_percent']:.0f} %" if status.hosts else UNKNOWN),
        Card(
            "Slots",
            f"{sum(each.busy for each in status.hosts)} of "
            f"{sum(each.slots for each in status.hosts)} busy",
        ),
    ]
    events = [
        [_clock_of(each["timestamp"]), each["level"], each["message"]]
        for each in status.recent_pressure_events
    ]
    changes = Table(
        "Changes", ("At", "Level", "What"), events, "The level has not changed recently."
    )
    chart = Chart(
        "Level over time, as measured by the monitor",
        [each.label for each in Level],
        _points(client),
        status.forced,
    )
    return Picture(
        status.sentence(command),
        cards=cards,
        chart=chart,
        tables=[_hosts(status.hosts, command), changes],
        actions=_drills(status),
    )


def _level(status: PlatformStatus, level: Level) -> tuple[str, Tone]:
    if status.known:
        return status.level, level_tone(level)
    return (UNKNOWN if status.enabled else "off"), ""


def _hosts(hosts: Sequence[HostReport], command: str) -> Table:
    rows: list[list[str | Cell]] = [
        [
            host.worker,
            Cell(Level(host.level).label, level_tone(Level(host.level)), badge=True),
            host.why,
            f"{host.busy} of {host.slots}",
            f"{host.sample.cpu_pct:.0f} %" if host.sample else "?",
            f"{host.sample.memory_pct:.0f} %" if host.sample else "?",
            ", ".join(host.queues),
        ]
        for host in hosts
    ]
    columns = ("Worker", "Level", "Why", "Busy slots", "CPU", "Memory", "Queues")
    return Table(
        title="Hosts",
        columns=columns,
        rows=rows,
        empty=f"No worker reports. Type: {command} worker",
        minor=("CPU", "Memory", "Queues"),
    )


def _drills(status: PlatformStatus) -> list[Action]:
    levels = [each.label for each in (Level.HIGH, Level.CRITICAL)]
    begin = [
        Action(
            name="force",
            title=f"Drill: {each}",
            label="",
            about={"level": each},
            confirm=f"Make all workers act on {each} for 10 minutes?",
        )
        for each in levels
    ]
    return [*begin, Action("release", "End the drill")] if status.forced else begin


def _points(client: Client) -> list[tuple[float, int]]:
    return [(each.at, int(each.level)) for each in reversed(client.pressure.history(SAMPLES))]


def breakers(client: Client) -> Picture:
    """Return all circuit breakers, open ones first."""
    states = client.breakers.status()
    now = client.ledger.clock()
    rows: list[list[str | Cell]] = [
        [
            name,
            Cell(at["state"], BREAKER_TONES[at["state"]], badge=True),
            f"{at['failure_count']:,}",
            age(now - at["last_failure_time"]) if at["last_failure_time"] else "never",
            next_probe(at["state"], at["retry_after_s"]),
            "" if at["state"] == "closed" else Cell("", action=_close(name)),
        ]
        for name, at in sorted(
            states.items(), key=lambda each: (-BREAKER_STATES[each[1]["state"]], each[0])
        )
    ]
    count = Counter(str(at["state"]) for at in states.values())
    cards = [
        Card("Open", str(count["open"]), "danger" if count["open"] else ""),
        Card("Half open", str(count["half-open"]), "warning" if count["half-open"] else ""),
        Card("Closed", str(count["closed"]), "success"),
    ]
    columns = ("Service", "State", "Failures", "Last failure", "Next probe", "")
    table = Table(
        title="",
        columns=columns,
        rows=rows,
        empty="No operation declares a breaker, and none was used.",
        minor=("Failures", "Last failure"),
    )
    sentence = (
        f"Open: {count['open']} of {len(states)}. "
        "A call that an open breaker refuses waits, or its fallback runs."
    )
    return Picture(sentence, cards=cards, tables=[table])


def _close(name: str) -> Action:
    return Action(
        name="reset",
        title="Close",
        label=f"Close breaker {name}",
        about={"breaker": name},
        confirm=f"Close breaker {name}?",
    )


def limits(client: Client) -> Picture:
    """Return the use of limits, the fullest first."""
    reports = sorted(client.limits(), key=lambda each: -each.fill)
    rows: list[list[str | Cell]] = [
        [
            each.service,
            each.name,
            _fill(each),
            duration(each.per_s) if each.per_s else "at once",
            f"{each.waiting:,}" if each.waiting else "",
            f"for {duration(each.hold_s)}" if each.hold_s else "",
        ]
        for each in reports
    ]
    full, held = sum(each.fill >= 1 for each in reports), sum(each.hold_s > 0 for each in reports)
    cards = [
        Card("Full", str(full), "warning" if full else ""),
        Card("In line", str(sum(each.waiting for each in reports))),
        Card("Held by a provider", str(held), "danger" if held else ""),
    ]
    columns = ("Service", "Limit", "Used", "Within", "Nodes in line", "Held by the provider")
    empty = "No operation of a live worker declares a limit."
    table = Table(
        title="",
        columns=columns,
        rows=rows,
        empty=empty,
        minor=("Nodes in line", "Held by the provider"),
    )
    sentence = "A node without a token or permit is parked, and holds no slot."
    return Picture(sentence, cards=cards, tables=[table])


def _fill(at: LimitReport) -> Cell:
    tone: Tone = "warning" if at.fill >= 1 else "active"
    return Cell(f"{figure(at.used)} of {figure(at.limit)}", tone, bar=min(1.0, at.fill))


def queues(client: Client) -> Picture:
    """Return the queues: waiting messages and their age, parked nodes, nodes in flight."""
    reports, consumers, open_jobs = client.queues(), client.pressure.consumers(), client.at_work()
    parked, running = Counter[str](), Counter[str]()
    for each in open_jobs:
        parked[each.queue] += each.parked
        running[each.queue] += each.running
    rows: list[list[str | Cell]] = [
        [
            name,
            f"{at.depth:,}",
            "" if at.oldest_s is None else duration(at.oldest_s),
            f"{parked[name]:,}",
            f"{running[name]:,}",
            ", ".join(consumers[name])
            if name in consumers
            else Cell("nobody", "danger", badge=True),
        ]
        for name, at in reports.items()
    ]
    ages = [at.oldest_s for at in reports.values() if at.oldest_s is not None]
    cards = [
        Card("Messages", f"{sum(at.depth for at in reports.values()):,}"),
        Card("The oldest waits", duration(max(ages)) if ages else "none"),
        Card("Parked nodes", f"{parked.total():,}"),
        Card("In flight", f"{running.total():,}", "active"),
    ]
    columns = ("Queue", "Messages", "The oldest waits", "Parked", "In flight", "Consumed by")
    sentence = "A message is one node; a parked node has none, and waits for a time or an event."
    return Picture(
        sentence,
        cards=cards,
        tables=[
            Table(
                title="",
                columns=columns,
                rows=rows,
                empty="",
                minor=("The oldest waits", "Parked", "In flight"),
            )
        ],
    )


PAGES: dict[str, Callable[[Client], Picture]] = {
    "jobs": jobs,
    "pressure": pressure,
    "breakers": breakers,
    "limits": limits,
    "queues": queues,
}


# --- numbers as text --------------------------------------------------------------------------


def _short(job: str) -> str:
    return job.partition("-")[0]


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d} UTC"


def _clock_of(timestamp: str) -> str:
    return timestamp.partition("T")[2][:8] + " UTC"
