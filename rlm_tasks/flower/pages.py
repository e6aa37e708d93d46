"""What each tab shows, as cards and tables: plain data that one script in the browser draws.

Decides what a person who operates the platform wants to see first.  Refuses to know Flower, HTML and who is looking; no item,
parameter, result or failure's message is on any page.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.degradation import Level
from rlm_tasks.errors import JobNotFound
from rlm_tasks.results import Progress, Status

if TYPE_CHECKING:
    from rlm_tasks.client import Client
    from rlm_tasks.job import Job
    from rlm_tasks.pressure import PlatformStatus
    from rlm_tasks.results import TreeNode

TABS = {"jobs": "Jobs", "pressure": "Pressure", "breakers": "Breakers", "limits": "Limits", "queues": "Queues"}
JOBS, NODES, LOOKS = 50, 300, 120
"""So many are shown: of jobs, of one job's nodes, of the monitor's looks."""

Tone = str  # "", active, success, danger: the colours of Flower's own cards
_TONES = {Status.SUCCEEDED: "success", Status.FAILED: "danger", Status.EXPIRED: "danger", Status.RUNNING: "active"}
_LEVEL_TONES = {Level.NORMAL: "success", Level.ELEVATED: "", Level.HIGH: "active"}


@dataclass(frozen=True, slots=True)
class Action:
    """A button: what it does, on what, and what is asked before."""

    name: str
    title: str
    about: dict[str, str] = field(default_factory=dict)
    confirm: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table, where plain text is not enough."""

    text: str
    tone: Tone = ""
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
    """Rows, or a word for there being none."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    empty: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A level over time: points are seconds of the epoch and a level's number."""

    title: str
    levels: Sequence[str]
    points: Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Picture:
    """One page."""

    sentence: str
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    chart: Chart | None = None
    actions: Sequence[Action] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


# --- jobs --------------------------------------------------------------------------------------------


def jobs(client: Client) -> Picture:
    """Return the newest jobs, the newest first."""
    found = [(job, progress) for job in client.jobs(JOBS) if (progress := _progress(job)) is not None]
    count = Counter(progress.status for _, progress in found)
    standing = client.at_work()
    cards = [
        Card("At work", str(len(standing)), "active"),
        Card("Nodes running", str(sum(each.running for each in standing))),
        Card("Succeeded", str(count[Status.SUCCEEDED]), "success"),
        Card("Failed", str(count[Status.FAILED] + count[Status.EXPIRED]), "danger"),
    ]
    rows = [_job_row(job, progress) for job, progress in found]
    columns = ("Job", "Status", "Progress", "Items", "Failed", "Nodes", "Time", "")
    return Picture(f"The newest {len(found)} jobs", cards, [Table("", columns, rows, "No job has been submitted yet.")])


def _progress(job: Job) -> Progress | None:
    try:
        return job.progress()
    except JobNotFound:
        return None  # it has expired since it was listed


def _job_row(job: Job, at: Progress) -> list[str | Cell]:
    return [
        Cell(job.id, link=job.id),
        Cell(str(at.status), _TONES.get(at.status, "")),
        Cell(f"{at.fraction:.0%}", bar=at.fraction),
        f"{at.total:,}",
        Cell(f"{at.failed:,}", "danger" if at.failed else ""),
        f"{at.nodes:,}",
        _seconds(at.elapsed_s),
        "" if at.status.final else Cell("", action=_cancel(job.id)),
    ]


def _cancel(job: str) -> Action:
    return Action("cancel", "Cancel", {"job": job}, f"Cancel job {job} with all of its nodes?")


def job(client: Client, job_id: str) -> Picture:
    """Return one job: how far it is, why it waits, its tree, its failures, its receipt.  Raises JobNotFound."""
    found = client.job(job_id)
    at, tree = found.progress(), found.tree()
    pace = f" {at.rate:,.1f} items a second" if at.rate else ""
    eta = "" if at.status.final or at.eta_s is None else f", about {_seconds(at.eta_s)} to go"
    cards = [
        Card("Status", str(at.status), _TONES.get(at.status, "")),
        Card("Items", f"{at.done + at.failed + at.skipped:,} of {at.total:,}", "active"),
        Card("Failed", f"{at.failed:,}", "danger" if at.failed else ""),
        Card("Time", _seconds(at.elapsed_s)),
    ]
    actions = [] if at.status.final else [_cancel(job_id)]
    if at.status.final and at.failed:
        actions.append(Action("retry", "Retry what failed", {"job": job_id}, "Open a new job on the failed items?"))
    sentence = found.explain() + (f"{pace}{eta}." if pace else "")
    return Picture(sentence, cards, [_tree(tree), *_outcome(found), _log(found)], actions=actions)


def _tree(tree: Sequence[TreeNode]) -> Table:
    rows: list[list[str | Cell]] = [
        [
            Cell(node.id, indent=node.depth), f"{node.lo:,} to {node.hi:,}", f"{node.worked:,}",
            Cell(node.state, _NODE_TONES.get(node.state, "")), f"{node.duration_ms:,.0f} ms" if node.duration_ms else "",
            node.worker, node.why,
        ]
        for node in tree[:NODES]
    ]  # fmt: skip
    more = f", the first {NODES}" if len(tree) > NODES else ""
    columns = ("Node", "Items", "Worked", "State", "Time", "Worker", "Why")
    return Table(f"Tree: {len(tree):,} nodes{more}", columns, rows, "No node yet.")


_NODE_TONES = {"running": "active", "done": "success", "cut": "success"}


def _outcome(found: Job) -> list[Table]:
    failures = [[f"{each.index:,}", each.type, each.code] for each in found.failures()]
    shaped = [[each.strategy, each.level, f"{each.items:,}"] for each in found.receipt()]
    receipt = "Nothing was left out: no pressure has shaped this job."
    return [
        Table("Failures", ("Item", "Type", "Code"), failures, "No item has failed."),
        Table("Receipt", ("Left out", "Under", "Items"), shaped, receipt),
    ]


def _log(found: Job) -> Table:
    events = found.events()
    rows = [[_clock(each.at), each.event, each.detail] for each in events[-30:]]
    return Table("What happened", ("At", "Event", "About"), rows, "Nothing yet.")


# --- the platform ------------------------------------------------------------------------------------


def pressure(client: Client) -> Picture:
    """Return the level now and over time, and the hosts."""
    status = client.status()
    level = Level[status.level.upper()]
    used = status.resource_usage
    cards = [
        Card("Level", status.level, _level_tone(level)),
        Card("CPU", f"{used['cpu_percent']:.0f} %"),
        Card("Memory", f"{used['memory_percent']:.0f} %"),
        Card("Slots", f"{sum(each.busy for each in status.hosts)} of {sum(each.slots for each in status.hosts)} busy", "active"),
    ]
    hosts: list[list[str | Cell]] = [
        [
            host.worker, Cell(Level(host.level).label, _level_tone(Level(host.level))), host.why,
            f"{host.busy} of {host.slots}", f"{host.sample.cpu_pct:.0f} %" if host.sample else "?",
            f"{host.sample.memory_pct:.0f} %" if host.sample else "?", ", ".join(host.queues),
        ]
        for host in status.hosts
    ]  # fmt: skip
    columns = ("Worker", "Level", "Why", "Busy slots", "CPU", "Memory", "Queues")
    events = [[_clock_of(each["timestamp"]), each["level"], each["message"]] for each in status.recent_pressure_events]
    return Picture(
        _sentence(status), cards,
        [
            Table("Hosts", columns, hosts, "No worker is alive: start one with celery worker."),
            Table("Of late", ("At", "Level", "Why"), events, "The level has not changed of late."),
        ],
        Chart("Level over time", [each.label for each in Level], _points(client)),
        [
            *(Action("force", f"Drill: {each.label}", {"level": each.label}, f"Make all workers act on {each.label} for 10 minutes?")
              for each in (Level.HIGH, Level.CRITICAL)),
            *([Action("release", "End the drill")] if status.forced else []),
        ],
    )  # fmt: skip


def _sentence(status: PlatformStatus) -> str:
    told = f"Pressure is {status.level}" + (f": {status.why}" if status.why else "")
    rising = f"; {status.rising_to} is expected within a minute" if status.rising_to else ""
    wanted = f" {status.desired_workers} workers would do." if status.desired_workers else ""
    blind = "" if status.monitored else " No beat is alive, each host acts on its own: start celery beat."
    return f"{told}{rising}.{wanted}{blind}"


def _points(client: Client) -> list[tuple[float, int]]:
    return [(each.at, int(each.level)) for each in reversed(client.pressure.history(LOOKS))]


def _level_tone(level: Level) -> Tone:
    return _LEVEL_TONES.get(level, "danger")


def breakers(client: Client) -> Picture:
    """Return all circuit breakers, those that are not closed first."""
    found = client.breakers.status()
    now = time.time()
    rows: list[list[str | Cell]] = [
        [
            name, Cell(at["state"], _BREAKER_TONES[at["state"]]), f"{at['failure_count']:,}",
            _ago(now - at["last_failure_time"]) if at["last_failure_time"] else "never",
            f"in {_seconds(at['retry_after_s'])}" if at["retry_after_s"] else "",
            "" if at["state"] == "closed" else Cell("", action=Action("reset", "Close", {"breaker": name}, f"Close breaker {name}?")),
        ]
        for name, at in sorted(found.items(), key=lambda each: (each[1]["state"] == "closed", each[0]))
    ]  # fmt: skip
    count = Counter(str(at["state"]) for at in found.values())
    cards = [
        Card("Open", str(count["open"]), "danger" if count["open"] else ""),
        Card("Half open", str(count["half-open"]), "active"),
        Card("Closed", str(count["closed"]), "success"),
    ]
    columns = ("Service", "State", "Failures", "Last failure", "Next probe", "")
    sentence = f"{count['open']} of {len(found)} breakers are open; what they guard waits, or takes its fallback."
    return Picture(sentence, cards, [Table("", columns, rows, "No operation declares a breaker, and none was used.")])


_BREAKER_TONES = {"closed": "success", "half-open": "active", "open": "danger"}


def limits(client: Client) -> Picture:
    """Return how full limits are, the fullest first."""
    found = sorted(client.limits(), key=lambda each: -each.fill)
    rows: list[list[str | Cell]] = [
        [
            each.service, each.name, Cell(f"{each.used:g} of {each.limit:g}", bar=min(1.0, each.fill)),
            f"in {each.per_s:g} s" if each.per_s else "at once", f"{each.waiting:,}" if each.waiting else "",
            f"for {_seconds(each.hold_s)}" if each.hold_s else "",
        ]
        for each in found
    ]  # fmt: skip
    full = sum(each.fill >= 1 for each in found)
    cards = [
        Card("Full", str(full), "active" if full else ""),
        Card("In line", str(sum(each.waiting for each in found))),
        Card("Held by a provider", str(sum(each.hold_s > 0 for each in found)), "danger"),
    ]
    columns = ("Service", "Limit", "Used", "Per", "Nodes in line", "Held by the provider")
    table = Table("", columns, rows, "No operation that this Flower imports (RLM_OPERATIONS) declares a limit.")
    return Picture("What has no token is parked, and holds no slot.", cards, [table])


def queues(client: Client) -> Picture:
    """Return the queues: what waits, for how long, what is parked and in flight."""
    found, consumers, standing = client.queues(), client.pressure.consumers(), client.at_work()
    parked, running = Counter[str](), Counter[str]()
    for each in standing:
        parked[each.queue] += each.parked
        running[each.queue] += each.running
    rows: list[list[str | Cell]] = [
        [
            name, f"{at.depth:,}", "" if at.oldest_s is None else _seconds(at.oldest_s), f"{parked[name]:,}", f"{running[name]:,}",
            ", ".join(consumers[name]) if name in consumers else Cell("nobody", "danger"),
        ]
        for name, at in found.items()
    ]  # fmt: skip
    oldest = max((at.oldest_s or 0.0 for at in found.values()), default=0.0)
    cards = [
        Card("Messages", f"{sum(at.depth for at in found.values()):,}", "active"),
        Card("The oldest waits", _seconds(oldest)),
        Card("Parked nodes", f"{parked.total():,}"),
        Card("In flight", f"{running.total():,}", "success"),
    ]
    columns = ("Queue", "Messages", "The oldest waits", "Parked", "In flight", "Consumed by")
    return Picture(
        "A message is one node; a parked node has none, and waits for a time or an event.", cards, [Table("", columns, rows, "")]
    )


PAGES: dict[str, Callable[[Client], Picture]] = {
    "jobs": jobs,
    "pressure": pressure,
    "breakers": breakers,
    "limits": limits,
    "queues": queues,
}


# --- figures for people ------------------------------------------------------------------------------


def _seconds(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _ago(seconds: float) -> str:
    return f"{_seconds(max(0.0, seconds))} ago"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d} UTC"


def _clock_of(timestamp: str) -> str:
    return timestamp.partition("T")[2][:8] + " UTC"
